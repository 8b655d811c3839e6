#include "../bias_act_layout.h"
#include "huge_pages.h"
#include "kernels.h"

namespace sage_fast {
namespace {

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, double slope, double gain, double clamp, int64_t act) {
  require(dim >= 0 && (dim < x.dim() || !b), "bias_act: dim must be an axis of x");
  BiasActParams p = biased_as(x, b ? &*b : nullptr, dim);
  p.slope = slope, p.gain = gain, p.clamp = clamp, p.act = Act(act);
  check(p, b ? b->numel() : -1);
  require(p.act == Act::leaky || dtype_of(x) != Dtype::float64, "bias_act: float64 has no smooth kernels");
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
  const bool wide_bias = b && b->scalar_type() != x.scalar_type();
  SAGE_CALL(bias_act)(values(x), b ? values(*b) : nullptr, wide_bias, p, dtype_of(x), y.mutable_data_ptr());
  return y;
}

Tensor bias_act_backward(Tensor grad, Tensor y, double slope, double gain, double clamp, int64_t act) {
  BiasActParams p{1, 1, y.numel(), slope, gain, clamp, Act(act)};
  check(p, -1);
  match(y, grad);
  require(p.act == Act::leaky || dtype_of(y) != Dtype::float64, "bias_act: float64 has no smooth kernels");
  Tensor out = new_like(y);
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  SAGE_CALL(bias_act_backward)(values(grad), values(y), y.numel(), p, dtype_of(y), out.mutable_data_ptr());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
}

}  // namespace sage_fast
