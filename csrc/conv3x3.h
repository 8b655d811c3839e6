// 3 x 3 convolution of square images, channels last, zeros around, stride 1: for training.
#pragma once

#include "contract.h"

namespace sage_fast {

struct Conv3x3Params {
  int64_t n, size, c_in, c_out;  // x [n, size, size, c_in], y [n, size, size, c_out], taps [3, 3, c_in, c_out]
};

inline void check(const Conv3x3Params& p) {
  require(p.size >= 4 && p.size % 4 == 0, "conv3x3: x must be square with sides that are multiples of 4");
  require(p.c_in > 0 && p.c_in % 16 == 0 && p.c_out > 0 && p.c_out % 16 == 0 && p.c_in <= 4096,
          "conv3x3: channels must be multiples of 16, at most 4096");
}

}  // namespace sage_fast
