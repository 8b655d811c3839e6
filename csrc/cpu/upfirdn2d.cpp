#include "../upfirdn2d.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../tensor.h"
#include "isa.h"

SAGE_DECLARE(void upfirdn2d(const void* x, const double* filter, const UpfirdnParams& p, Dtype dtype, void* y))

namespace sage_fast {
namespace {

template <class T>
void copy_taps(const Tensor& f, double* taps) {
  const int64_t rows = f.dim() == 2 ? f.size(0) : 1, columns = f.size(f.dim() - 1);
  const int64_t row = f.dim() == 2 ? f.stride(0) : 0, column = f.stride(f.dim() - 1);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) taps[i * columns + j] = static_cast<double>(data<T>(f)[i * row + j * column]);
  }
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
  double taps[32 * 32], side[32];
  double* const read = f.dim() == 2 ? taps : side;
  switch (dtype_of(f)) {
    case Dtype::float32:
      copy_taps<float>(f, read);
      break;
    case Dtype::float64:
      copy_taps<double>(f, read);
      break;
    case Dtype::bfloat16:
      copy_taps<torch::headeronly::BFloat16>(f, read);
      break;
    case Dtype::float16:
      copy_taps<torch::headeronly::Half>(f, read);
  }
  for (int64_t i = 0; f.dim() == 1 && i < p.kh * p.kw; ++i) taps[i] = side[i / p.kw] * side[i % p.kw];
  Tensor y = new_images(x, n, c, p.out_h(), p.out_w(), last);
  SAGE_CALL(upfirdn2d)(x.const_data_ptr(), taps, p, dtype_of(x), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
