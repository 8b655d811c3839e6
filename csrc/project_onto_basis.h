// B (B^T w) per layer: w [n, layers, dim], basis [layers, dim, rank].
#pragma once

#include "contract.h"

namespace sage_fast {

struct ProjectParams {
  int64_t n, layers, dim, rank;
  int64_t w_row, w_layer, basis_layer, basis_row;  // strides; the last axis of both is contiguous
};

}  // namespace sage_fast
