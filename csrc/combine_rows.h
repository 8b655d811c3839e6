// weights [n, m] times named rows [m] and columns [k] of a table [., c] less its centre [c].
#pragma once

#include "contract.h"

namespace sage_fast {

struct CombineParams {
  int64_t n, m, columns, weight_row, table_row;  // the last two are strides
};

}  // namespace sage_fast
