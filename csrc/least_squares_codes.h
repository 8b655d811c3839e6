// A+ w per layer: w [n, layers, dim], pinv [layers, k, dim].
#pragma once

#include "contract.h"

namespace sage_fast {

struct CodesParams {
  int64_t n, layers, dim, k;
  int64_t w_row, w_layer, pinv_layer, pinv_row;  // strides; the last axis of both is contiguous
};

}  // namespace sage_fast
