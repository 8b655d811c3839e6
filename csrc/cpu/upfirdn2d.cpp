#include "../upfirdn2d.h"

#include <vector>

#include "../tensor.h"
#include "isa.h"

SAGE_DECLARE(template <class T> void upfirdn2d(const T* x, const double* filter, const UpfirdnParams& p, T* y))

namespace sage_fast {
namespace {

Tensor upfirdn2d(Tensor x, Tensor f, int64_t up, int64_t down, int64_t left, int64_t right, int64_t top, int64_t bottom,
                 bool flip_filter, double gain) {
  require(x.dim() == 4 && f.dim() == 2, "upfirdn2d: x must be [N, C, H, W] and f [kh, kw]");
  UpfirdnParams p{x.size(0) * x.size(1), x.size(2), x.size(3), f.size(0), f.size(1), up, down, left, right, top, bottom,
                  flip_filter,           gain};
  check(p);
  x = torch::stable::contiguous(x);
  f = torch::stable::contiguous(f);
  std::vector<double> taps(p.kh * p.kw);
  dispatch(f, [&](auto zero) {
    using T = decltype(zero);
    std::copy_n(data<T>(f), taps.size(), taps.begin());
  });
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), p.out_h(), p.out_w()});
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(upfirdn2d<T>)(data<T>(x), taps.data(), p, mutable_data<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
