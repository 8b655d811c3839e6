#include "../bias_act.h"

#include "../tensor.h"
#include "isa.h"

SAGE_DECLARE(template <class T> void bias_act(const T* x, const T* b, const BiasActParams& p, T* y))
SAGE_DECLARE(template <class T>
             void bias_act_backward(const T* grad, const T* y, int64_t n, const BiasActParams& p, T* out))

namespace sage_fast {
namespace {

Tensor bias_act(Tensor x, std::optional<Tensor> b, int64_t dim, double slope, double gain, double clamp) {
  require(dim >= 0 && (dim < x.dim() || !b), "bias_act: dim must be an axis of x");
  x = torch::stable::contiguous(x);
  BiasActParams p{1, 1, x.numel(), slope, gain, clamp};
  if (b) {
    b = torch::stable::contiguous(*b);
    require(b->scalar_type() == x.scalar_type(), "bias_act: b must have the dtype of x");
    p.inner = 1;
    for (int64_t i = 0; i < x.dim(); ++i) (i < dim ? p.outer : i == dim ? p.channels : p.inner) *= x.size(i);
  }
  check(p, b ? b->numel() : -1);
  Tensor y = torch::stable::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    if (x.numel()) SAGE_CALL(bias_act<T>)(data<T>(x), b ? data<T>(*b) : nullptr, p, mutable_data<T>(y));
  });
  return y;
}

Tensor bias_act_backward(Tensor grad, Tensor y, double slope, double gain, double clamp) {
  require(grad.numel() == y.numel() && grad.scalar_type() == y.scalar_type(), "bias_act_backward: grad must match y");
  BiasActParams p{1, 1, grad.numel(), slope, gain, clamp};
  check(p, -1);
  grad = torch::stable::contiguous(grad);
  y = torch::stable::contiguous(y);
  Tensor out = torch::stable::empty_like(grad);
  dispatch(grad, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(bias_act_backward<T>)(data<T>(grad), data<T>(y), grad.numel(), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward));
}

}  // namespace sage_fast
