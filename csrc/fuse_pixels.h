// edited + M * (what the blend adds), M from the differences of three images: [SAGE], Eq. 21 and 22. Where `low` is
// given, edited is first that of Eq. 23: clamped(edited + low).
#pragma once

#include <cmath>

#include "contract.h"

namespace sage_fast {

enum class Blend : int64_t { residual, convex, printed };

struct FusePixelsParams {
  int64_t n, c, h, w;                          // of the edited images; the others are [n or 1, c, h, w]
  int64_t real_step, inverted_step, low_step;  // values from image to image: c h w, or 0 for one that all share
  double beta;
  Blend blend;
  double side, middle;  // of the row [side, middle, side] whose outer square blurs the mask; their sum is one

  // blur: standard deviation of that row in pixels
  void set_blur(double blur) {
    const double beside = std::exp(-1 / (2 * blur * blur)), sum = 1 + 2 * beside;
    side = beside / sum, middle = 1 / sum;
  }
};

}  // namespace sage_fast
