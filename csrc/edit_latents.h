// class_embedding[row(i)] + alpha A (mask codes) per layer: codes [n, layers, k], directions [layers, dim, k].
#pragma once

#include "contract.h"

namespace sage_fast {

struct EditParams {
  int64_t n, layers, dim, k;
  int64_t rows, mask_rows;  // of class_embedding [rows, layers, dim]; of mask [mask_rows, layers, k], 0 without a mask
  int64_t embedding_row, embedding_layer, code_row, code_layer, direction_layer, direction_row;  // strides
  double alpha;
};

}  // namespace sage_fast
