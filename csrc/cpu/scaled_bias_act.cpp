#include "../scaled_bias_act_layout.h"
#include "huge_pages.h"
#include "isa.h"

SAGE_DECLARE(void scaled_bias_act(const void* x, const void* scale, const void* noise, const void* strength,
                                  const void* b, const ScaledBiasActParams& p, Dtype dtype, void* y))
SAGE_DECLARE(void scaled_bias_act_backward(const void* grad, const void* x, const void* y, const void* scale,
                                           const void* noise, const ScaledBiasActParams& p, Dtype dtype, void* out,
                                           void* of_scale, void* of_b, void* of_strength))

namespace sage_fast {
namespace {

Tensor scaled_bias_act(Tensor x, std::optional<Tensor> scale, std::optional<Tensor> noise,
                       std::optional<Tensor> strength, std::optional<Tensor> b, double slope, double gain,
                       double clamp) {
  const ScaledBiasActParams p = scaled_as(x, noise, slope, gain, clamp);
  const ScaledBiasActFactors given(p, x, scale, noise, strength, b);
  Tensor y = new_images(x, x.size(0), x.size(1), x.size(2), x.size(3), true);
  if (x.numel() == 0) return y;
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * y.element_size());
  SAGE_CALL(scaled_bias_act)(values(x), given.scale, given.noise, given.strength, given.b, p, dtype_of(x),
                             y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_bias_act_backward(Tensor grad, std::optional<Tensor> x, Tensor y,
                                                                    std::optional<Tensor> scale,
                                                                    std::optional<Tensor> noise, double slope,
                                                                    double gain, double clamp) {
  ScaledBiasActBackward call(grad, x, y, scale, noise, slope, gain, clamp);
  ScaledBiasActGradients& made = call.made;
  if (y.numel() == 0) return made.all();
  prefer_huge_pages(made.x.mutable_data_ptr(), y.numel() * y.element_size());
  SAGE_CALL(scaled_bias_act_backward)(values(grad), x ? values(*x) : nullptr, values(y), call.given.scale,
                                      call.given.noise, call.p, dtype_of(y), made.x.mutable_data_ptr(),
                                      made.scale.mutable_data_ptr(), made.b.mutable_data_ptr(),
                                      made.strength.mutable_data_ptr());
  return made.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("scaled_bias_act", TORCH_BOX(&scaled_bias_act));
  m.impl("scaled_bias_act_backward", TORCH_BOX(&scaled_bias_act_backward));
}

}  // namespace sage_fast
