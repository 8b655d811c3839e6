// 3 x 3 convolutions of square images, channels last, and what their derivatives need: for training.
//   stride 1: y [size, size] from x [size, size], zeros around
//   stride 2: y [size, size] from x [2 size + 1, 2 size + 1], no zeros
#pragma once

#include "contract.h"
#include "dtype.h"

namespace sage_fast {

struct Conv3x3Params {
  int64_t n, size, stride, x_channels, y_channels;
  Dtype dtype;                               // of x and y; weights and all sums are float32
  float scale;                               // of the weight: it is multiplied by this before anything else
  int64_t weight_stride_y, weight_stride_x;  // weight [y_channels, x_channels, 3, 3], its 9 taps side by side

  // multiplied as it is, on processors with products of bfloat16; all else goes through the transform's domain
  bool strided_bf16() const { return stride == 2 && dtype == Dtype::bfloat16; }
  int64_t x_size() const { return stride == 1 ? size : 2 * size + 1; }
};

inline void check(const Conv3x3Params& p) {
  require(p.stride == 1 || p.stride == 2, "conv3x3: stride must be 1 or 2");
  require(p.size >= 4 && p.size % 4 == 0, "conv3x3: y must be square with sides that are multiples of 4");
  require(p.x_channels > 0 && p.x_channels % 16 == 0 && p.y_channels > 0 && p.y_channels % 16 == 0 &&
              p.x_channels <= 4096 && p.y_channels <= 4096,
          "conv3x3: channels must be multiples of 16, at most 4096");
  require(p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16, "conv3x3: images must be float32 or bfloat16");
}

}  // namespace sage_fast
