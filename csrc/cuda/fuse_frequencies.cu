#include "../fusion.h"
#include "low_pass.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// What the low-pass is taken of: [images, c, h, w], `size` values an image.
template <class T>
__global__ void change_of(const T* __restrict__ real, const T* __restrict__ inverted, const T* __restrict__ edited,
                          FuseFrequenciesParams p, int64_t size, int64_t total, T* __restrict__ y) {
  const T more = T(p.gamma1 - 1), less = T(p.gamma2);
  SAGE_FAST_GRID_STRIDE(i, total) {
    const int64_t image = i / size, at = i % size;
    const T source = real[image * p.real_step + at] - less * inverted[image * p.inverted_step + at];
    y[i] = more == 0 ? source : more * edited[i] + source;
  }
}

template <class T>
__global__ void add_shared(const T* __restrict__ edited, const T* __restrict__ low, int64_t size, int64_t total,
                           T* __restrict__ y) {
  SAGE_FAST_GRID_STRIDE(i, total) y[i] = edited[i] + low[i % size];
}

Tensor fuse_frequencies(Tensor real, Tensor inverted, Tensor edited, double gamma1, double gamma2, double sigma) {
  const FuseFrequenciesParams p = fuse_frequencies_params(real, inverted, edited, gamma1, gamma2, sigma);
  Scope stream(edited);
  if (edited.numel() == 0) return torch::stable::empty_like(edited);
  const bool share = p.one_source() && p.n > 1;
  const int64_t images = share ? 1 : p.n, size = p.c * p.h * p.w;
  Tensor change = torch::stable::new_empty(edited, {images * p.c, p.h, p.w}), out = edited;
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    change_of<T><<<blocks_for(images * size, kThreads), kThreads, 0, stream>>>(
        data<T>(real), data<T>(inverted), data<T>(edited), p, size, images * size, mutable_data<T>(change));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    Tensor low = low_pass<T>(change, {sigma, false, false}, stream, share ? nullptr : data<T>(edited));
    if (!share) {
      out = torch::stable::view(low, {p.n, p.c, p.h, p.w});
      return;
    }
    out = torch::stable::empty_like(edited);
    add_shared<T><<<blocks_for(edited.numel(), kThreads), kThreads, 0, stream>>>(data<T>(edited), data<T>(low), size,
                                                                                 edited.numel(), mutable_data<T>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("fuse_frequencies", TORCH_BOX(&fuse_frequencies)); }

}  // namespace sage_fast
