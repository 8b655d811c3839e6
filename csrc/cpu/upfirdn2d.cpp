#include "../upfirdn2d.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../tensor.h"
#include "huge_pages.h"
#include "kernels.h"

namespace sage_fast {
namespace {

template <class T>
void read_taps(const Tensor& f, const UpfirdnParams& p, double* taps) {
  const bool one_row = f.dim() == 1;
  sage_fast::read_taps(data<T>(f), one_row, one_row ? 0 : f.stride(0), f.stride(f.dim() - 1), p, taps);
}

Tensor upfirdn2d(Tensor x, Tensor f, int64_t up, int64_t down, int64_t left, int64_t right, int64_t top, int64_t bottom,
                 bool flip_filter, double gain) {
  require(x.dim() == 4 && (f.dim() == 1 || f.dim() == 2), "upfirdn2d: x must be [N, C, H, W] and f [k] or [kh, kw]");
  const bool last = channels_last(x);
  if (!last && !x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t n = x.size(0), c = x.size(1);
  UpfirdnParams p{last ? n : n * c,
                  x.size(2),
                  x.size(3),
                  last ? c : 1,
                  f.size(0),
                  f.size(f.dim() - 1),
                  up,
                  down,
                  left,
                  right,
                  top,
                  bottom,
                  flip_filter,
                  gain};
  check(p);
  double taps[32 * 32];
  switch (dtype_of(f)) {
    case Dtype::float32:
      read_taps<float>(f, p, taps);
      break;
    case Dtype::float64:
      read_taps<double>(f, p, taps);
      break;
    case Dtype::bfloat16:
      read_taps<torch::headeronly::BFloat16>(f, p, taps);
      break;
    case Dtype::float16:
      read_taps<torch::headeronly::Half>(f, p, taps);
  }
  Tensor y = new_images(x, n, c, p.out_h(), p.out_w(), last);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
  SAGE_CALL(upfirdn2d)(values(x), taps, p, dtype_of(x), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
