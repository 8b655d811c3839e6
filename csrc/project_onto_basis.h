// B (B^T w) per layer: w [n, layers, dim], basis [layers, dim, rank].
#pragma once

#include "contract.h"

namespace sage_fast {

struct ProjectParams {
  int64_t n, layers, dim, rank;
};

}  // namespace sage_fast
