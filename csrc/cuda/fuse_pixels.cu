#include "../fusion.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kWide = 32, kHigh = 8;  // pixels of a block

template <class T>
__device__ T clamped(T v, T low, T high) {
  v = v < low ? low : v;  // NaN stays: every comparison with it is false
  return v > high ? high : v;
}

template <class T>
__device__ T edited_value(const T* edited, const T* low, int64_t i) {
  return low ? clamped(edited[i] + low[i], T(-1), T(1)) : edited[i];
}

// Pixel before or behind the first or last one, mirrored about it.
__device__ int64_t mirrored(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  i = i >= n ? 2 * n - 2 - i : i;
  return i < 0 ? 0 : i >= n ? n - 1 : i;  // of an axis of one pixel, and what no output needs
}

// real, inverted, low (may be null) [n or 1, c, h, w], edited [n, c, h, w] -> y. A block makes the mask before its blur
// with a border of one pixel in shared memory.
template <class T>
__global__ void run(const T* __restrict__ real, const T* __restrict__ inverted, const T* __restrict__ edited,
                    const T* __restrict__ low, FusePixelsParams p, T* __restrict__ y) {
  __shared__ T sharp[kHigh + 2][kWide + 2];
  const int64_t x0 = int64_t{blockIdx.x} * kWide, y0 = int64_t{blockIdx.y} * kHigh, plane = p.h * p.w;
  const int thread = threadIdx.y * kWide + threadIdx.x;
  for (int64_t n = blockIdx.z; n < p.n; n += gridDim.z) {
    const T *a = real + n * p.real_step, *b = inverted + n * p.inverted_step, *e = edited + n * p.c * plane;
    const T* l = low ? low + n * p.low_step : nullptr;
    for (int i = thread; i < (kHigh + 2) * (kWide + 2); i += kHigh * kWide) {
      const int row = i / (kWide + 2), col = i % (kWide + 2);
      int64_t at = mirrored(y0 + row - 1, p.h) * p.w + mirrored(x0 + col - 1, p.w);
      T lost = 0, changed = 0;
      for (int64_t c = 0; c < p.c; ++c, at += plane) {
        const T back = b[at], from_real = a[at] - back, from_edited = edited_value(e, l, at) - back;
        lost += from_real * from_real;
        changed += from_edited * from_edited;
      }
      // images in [0, 1] differ by half as much as in [-1, 1]
      sharp[row][col] = T(0.5) * (sqrt(lost) - T(p.beta) * sqrt(changed));
    }
    __syncthreads();
    const int64_t px = x0 + threadIdx.x, py = y0 + threadIdx.y;
    if (px < p.w && py < p.h) {
      const T side = T(p.side), middle = T(p.middle);
      T rows[3];
      for (int r = 0; r < 3; ++r) {
        const T* row = &sharp[threadIdx.y + r][threadIdx.x];
        rows[r] = middle * row[1] + side * (row[0] + row[2]);
      }
      const T mask = clamped(middle * rows[1] + side * (rows[0] + rows[2]), T(0), T(1));
      int64_t at = py * p.w + px;
      for (int64_t c = 0; c < p.c; ++c, at += plane) {
        const T value = edited_value(e, l, at);
        const T add = p.blend == Blend::residual ? a[at] - b[at] : p.blend == Blend::convex ? a[at] - value : a[at] + 1;
        y[n * p.c * plane + at] = value + mask * add;
      }
    }
    __syncthreads();
  }
}

Tensor fuse_pixels(Tensor real, Tensor inverted, Tensor edited, std::optional<Tensor> low, double beta, int64_t blend,
                   double blur) {
  const FusePixelsParams p = fuse_pixels_params(real, inverted, edited, low, beta, blend, blur);
  Scope stream(edited);
  Tensor out = torch::stable::empty_like(edited);
  if (edited.numel() == 0) return out;
  require(p.h <= 65535 * kHigh, "fuse_pixels: at most 524280 rows");
  const dim3 grid(static_cast<unsigned>((p.w + kWide - 1) / kWide), static_cast<unsigned>((p.h + kHigh - 1) / kHigh),
                  depth_for(p.n));
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<grid, dim3(kWide, kHigh), 0, stream>>>(data<T>(real), data<T>(inverted), data<T>(edited),
                                                    low ? data<T>(*low) : nullptr, p, mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("fuse_pixels", TORCH_BOX(&fuse_pixels)); }

}  // namespace sage_fast
