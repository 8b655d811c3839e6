#include "../least_squares_codes.h"

#include "../latents.h"
#include "kernels.h"

namespace sage_fast {
namespace {

Tensor least_squares_codes(Tensor delta_w, Tensor pseudo_inverse) {
  check_codes(delta_w, pseudo_inverse);
  delta_w = last_axis_contiguous(delta_w);
  pseudo_inverse = last_axis_contiguous(pseudo_inverse);
  const CodesParams p = codes_params(delta_w, pseudo_inverse);
  Tensor out = new_latents(delta_w, p.n, p.layers, p.k);
  if (p.dim == 0) return torch::stable::zero_(out);
  if (p.n * p.layers * p.k == 0) return out;
  dispatch(delta_w, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(least_squares_codes<T>)(data<T>(delta_w), data<T>(pseudo_inverse), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("least_squares_codes", TORCH_BOX(&least_squares_codes)); }

}  // namespace sage_fast
