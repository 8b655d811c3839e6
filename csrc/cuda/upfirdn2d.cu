#include "../upfirdn2d.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// x [planes, h, w], f [kh, kw] -> y [planes, out_h, out_w]; one thread a pixel, over the taps that meet a pixel of x.
// The filter lies in shared memory as correlation taps.
template <class T>
__global__ void run(const T* __restrict__ x, const T* __restrict__ f, UpfirdnParams p, int64_t out_h, int64_t out_w,
                    T* __restrict__ y) {
  __shared__ T taps[32 * 32];
  const int n_taps = static_cast<int>(p.kh * p.kw);
  for (int i = threadIdx.x; i < n_taps; i += blockDim.x) taps[i] = f[p.flip ? i : n_taps - 1 - i] * T(p.gain);
  __syncthreads();

  SAGE_FAST_GRID_STRIDE(i, p.planes * out_h * out_w) {
    const int64_t plane = i / (out_h * out_w);
    const int64_t top = (i / out_w) % out_h * p.down - p.top, left = i % out_w * p.down - p.left;
    // first pixel of x at or behind the corner of the window, and the tap that meets it
    const int64_t y0 = top > 0 ? (top + p.up - 1) / p.up : 0, x0 = left > 0 ? (left + p.up - 1) / p.up : 0;
    const T* in = x + plane * p.h * p.w;
    T sum = 0;
    for (int64_t yy = y0, ky = y0 * p.up - top; yy < p.h && ky < p.kh; ++yy, ky += p.up) {
      for (int64_t xx = x0, kx = x0 * p.up - left; xx < p.w && kx < p.kw; ++xx, kx += p.up) {
        sum += taps[ky * p.kw + kx] * in[yy * p.w + xx];
      }
    }
    y[i] = sum;
  }
}

Tensor upfirdn2d(Tensor x, Tensor f, int64_t up, int64_t down, int64_t left, int64_t right, int64_t top, int64_t bottom,
                 bool flip_filter, double gain) {
  require(x.dim() == 4 && f.dim() == 2 && x.is_cuda() && f.is_cuda(),
          "upfirdn2d: x must be [N, C, H, W] and f [kh, kw] beside it");
  UpfirdnParams p{x.size(0) * x.size(1), x.size(2), x.size(3), f.size(0), f.size(1), up, down, left, right, top, bottom,
                  flip_filter,           gain};
  check(p);
  Scope stream(x);
  x = torch::stable::contiguous(x);
  f = torch::stable::contiguous(torch::stable::to(f, x.scalar_type()));
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), p.out_h(), p.out_w()});
  if (y.numel() == 0) return y;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    run<T><<<blocks_for(y.numel(), kThreads), kThreads, 0, stream>>>(data<T>(x), data<T>(f), p, p.out_h(), p.out_w(),
                                                                     mutable_data<T>(y));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
