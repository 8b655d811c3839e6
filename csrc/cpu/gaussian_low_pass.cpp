#include "../gaussian_low_pass.h"

#include "../tensor.h"
#include "isa.h"

SAGE_DECLARE(template <class T>
             void gaussian_low_pass(const T* x, int64_t planes, int64_t h, int64_t w, Taps rows, Taps cols, T* y))

namespace sage_fast {
namespace {

Tensor gaussian_low_pass(Tensor images, double sigma) {
  require(images.dim() == 4, "gaussian_low_pass: images must be [N, C, H, W]");
  images = torch::stable::contiguous(images);
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) return out;
  dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const double tolerance = sizeof(T) == 4 ? 1e-9 : 1e-18;
    const int64_t h = images.size(2), w = images.size(3);
    const LowPassKernel rows = low_pass_kernel(h, sigma, tolerance), cols = low_pass_kernel(w, sigma, tolerance);
    SAGE_CALL(gaussian_low_pass<T>)
    (data<T>(images), images.size(0) * images.size(1), h, w, rows.view(), cols.view(), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("gaussian_low_pass", TORCH_BOX(&gaussian_low_pass)); }

}  // namespace sage_fast
