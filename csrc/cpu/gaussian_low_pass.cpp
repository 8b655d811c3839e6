#include "../gaussian_low_pass.h"

#include "tensor.h"

namespace sage_fast {
namespace {

// out[i] += t * (a[i] + b[i]): the two pixels at the same distance share a tap.
template <class T>
inline void axpy2(T t, const T* __restrict a, const T* __restrict b, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += t * (a[i] + b[i]);
}

template <class T>
inline void scale(T t, const T* __restrict a, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = t * a[i];
}

// x [planes, h, w] -> y: columns first, whole rows at a time, then each row behind and before a copy of its ends.
template <class T>
void run(const T* x, int64_t planes, int64_t h, int64_t w, const LowPassKernel& rows, const LowPassKernel& cols, T* y) {
  parallel(planes, 1 + 16384 / (h * w + 1), [&](int64_t begin, int64_t end) {
    const int64_t reach = cols.radius;
    std::vector<T> wide(w + 2 * reach);
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* in = x + plane * h * w;
      T* out = y + plane * h * w;
      for (int64_t i = 0; i < h; ++i) {
        T* middle = wide.data() + reach;
        scale(T(rows.taps[0]), in + i * w, middle, w);
        for (int64_t k = 1; k <= rows.radius; ++k) {
          axpy2(T(rows.taps[k]), in + (i + h - k) % h * w, in + (i + k) % h * w, middle, w);
        }
        for (int64_t k = 0; k < reach; ++k) {
          middle[-1 - k] = middle[w - 1 - k];
          middle[w + k] = middle[k];
        }
        scale(T(cols.taps[0]), middle, out + i * w, w);
        for (int64_t k = 1; k <= reach; ++k) axpy2(T(cols.taps[k]), middle - k, middle + k, out + i * w, w);
      }
    }
  });
}

Tensor gaussian_low_pass(Tensor images, double sigma) {
  require(images.dim() == 4, "gaussian_low_pass: images must be [N, C, H, W]");
  images = torch::stable::contiguous(images);
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) return out;
  dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const double tolerance = sizeof(T) == 4 ? 1e-10 : 1e-18;
    const int64_t h = images.size(2), w = images.size(3);
    run<T>(data<T>(images), images.size(0) * images.size(1), h, w, low_pass_kernel(h, sigma, tolerance),
           low_pass_kernel(w, sigma, tolerance), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("gaussian_low_pass", TORCH_BOX(&gaussian_low_pass)); }

}  // namespace sage_fast
