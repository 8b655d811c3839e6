// edited + low-pass of ((gamma1 - 1) edited + real - gamma2 inverted): [SAGE], Eq. 23.
#pragma once

#include "contract.h"

namespace sage_fast {

struct FuseFrequenciesParams {
  int64_t n, c, h, w;                // of the edited images; the others are [n or 1, c, h, w]
  int64_t real_step, inverted_step;  // values from image to image: c h w, or 0 for one that all share
  double gamma1, gamma2;

  // The low-pass is that of the source alone, shared by its edits.
  bool one_source() const { return gamma1 == 1 && real_step == 0 && inverted_step == 0; }
};

}  // namespace sage_fast
