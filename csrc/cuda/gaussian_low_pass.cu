#include "../gaussian_low_pass.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// Circular convolution of [outer, n, inner] along n with symmetric taps [radius + 1]; one thread a value.
template <class T>
__global__ void circular(const T* __restrict__ x, const T* __restrict__ taps, int radius, int64_t n, int64_t inner,
                         int64_t size, T* __restrict__ y) {
  extern __shared__ unsigned char memory[];
  T* t = reinterpret_cast<T*>(memory);
  for (int k = threadIdx.x; k <= radius; k += blockDim.x) t[k] = taps[k];
  __syncthreads();
  SAGE_FAST_GRID_STRIDE(i, size) {
    const int64_t at = (i / inner) % n;
    const T* line = x + (i - at * inner);
    T sum = t[0] * x[i];
    int64_t before = at, behind = at;
    for (int k = 1; k <= radius; ++k) {
      before = before == 0 ? n - 1 : before - 1;
      behind = behind == n - 1 ? 0 : behind + 1;
      sum += t[k] * (line[before * inner] + line[behind * inner]);
    }
    y[i] = sum;
  }
}

template <class T>
void along(const Tensor& x, int64_t n, int64_t inner, double sigma, cudaStream_t stream, const Tensor& y) {
  const LowPassKernel kernel = low_pass_kernel(n, sigma, sizeof(T) == 4 ? 1e-10 : 1e-18);
  const std::vector<T> host(kernel.taps.begin(), kernel.taps.end());
  Tensor taps = torch::stable::new_empty(x, {static_cast<int64_t>(host.size())});
  // pageable memory: the call returns only when the host buffer may be reused
  STD_CUDA_CHECK(
      cudaMemcpyAsync(taps.mutable_data_ptr(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
  circular<T><<<blocks_for(x.numel(), kThreads), kThreads, host.size() * sizeof(T), stream>>>(
      data<T>(x), data<T>(taps), static_cast<int>(kernel.radius), n, inner, x.numel(), mutable_data<T>(y));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gaussian_low_pass(Tensor images, double sigma) {
  require(images.dim() == 4, "gaussian_low_pass: images must be [N, C, H, W]");
  Scope stream(images);
  images = torch::stable::contiguous(images);
  Tensor rows = torch::stable::empty_like(images), out = torch::stable::empty_like(images);
  if (images.numel() == 0) return out;
  require(images.size(2) <= 8192 && images.size(3) <= 8192, "gaussian_low_pass: sides of at most 8192 pixels");
  dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    along<T>(images, images.size(3), 1, sigma, stream, rows);
    along<T>(rows, images.size(2), images.size(3), sigma, stream, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("gaussian_low_pass", TORCH_BOX(&gaussian_low_pass)); }

}  // namespace sage_fast
