// Pad, upsample, filter, downsample: parameters, contract and output shape, used by both devices.
#pragma once

#include "contract.h"

namespace sage_fast {

// Beyond any image. The kernels hold rows with the zeros around them, so it bounds their memory, whatever `down`
// leaves.
constexpr int64_t kMostPadding = 1 << 16;

struct UpfirdnParams {
  int64_t planes, h, w, inner;  // input [planes, h, w, inner]: inner is 1, or C where the channels come last
  int64_t kh, kw;               // filter [kh, kw]
  int64_t up, down;
  int64_t left, right, top, bottom;  // in upsampled pixels, at most kMostPadding; negative: crop
  bool flip;                         // true: correlate, false: convolve
  double gain;

  int64_t out_h() const { return (h * up + top + bottom - kh) / down + 1; }
  int64_t out_w() const { return (w * up + left + right - kw) / down + 1; }
};

inline void check(const UpfirdnParams& p) {
  constexpr int64_t most = int64_t{1} << 31;
  require(p.up >= 1 && p.down >= 1 && p.up < most && p.down < most, "upfirdn2d: up and down must be 1 to 2^31 - 1");
  for (int64_t pad : {p.left, p.right, p.top, p.bottom}) {
    require(pad > -most && pad <= kMostPadding, "upfirdn2d: padding must be at most 2^16 and above -2^31");
  }
  require(p.kh >= 1 && p.kw >= 1 && p.kh <= 32 && p.kw <= 32, "upfirdn2d: f must have sides from 1 to 32");
  require(p.h >= 1 && p.w >= 1, "upfirdn2d: x must have at least one row and column");
  require(p.h * p.up + p.top + p.bottom >= p.kh && p.w * p.up + p.left + p.right >= p.kw,
          "upfirdn2d: padding leaves images smaller than the filter");
  require(double(p.planes) * double(p.inner) * double(p.out_h()) * double(p.out_w()) < 1e18,
          "upfirdn2d: up and padding make images too large");
}

// A filter f [k] or [kh, kw] of any strides (counted in values) -> taps [kh, kw], of [k] the outer product of itself.
template <class T>
void read_taps(const T* f, bool one_row, int64_t row_stride, int64_t stride, const UpfirdnParams& p, double* taps) {
  const auto at = [=](int64_t i, int64_t j) { return static_cast<double>(f[i * row_stride + j * stride]); };
  for (int64_t i = 0; i < p.kh; ++i) {
    for (int64_t j = 0; j < p.kw; ++j) taps[i * p.kw + j] = one_row ? at(0, i) * at(0, j) : at(i, j);
  }
}

#ifdef __CUDACC__
#define SAGE_FAST_BOTH __host__ __device__
#else
#define SAGE_FAST_BOTH
#endif
SAGE_FAST_BOTH inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
SAGE_FAST_BOTH inline int64_t ceil_div(int64_t a, int64_t b) { return floor_div(a + b - 1, b); }

}  // namespace sage_fast
