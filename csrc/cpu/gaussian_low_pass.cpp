#include "../tensor.h"
#include "kernels.h"
#include "low_pass_plan.h"

namespace sage_fast {
namespace {

Tensor gaussian_low_pass(Tensor images, double sigma, bool reflect, bool pixels) {
  require(images.dim() == 4, "gaussian_low_pass: images must be [N, C, H, W]");
  require(sigma > 0 && std::isfinite(sigma), "gaussian_low_pass: sigma must be positive and finite");
  images = torch::stable::contiguous(images);
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) return out;
  dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const auto plan = recent_plan<LowPassPlan<T>>(images.size(2), images.size(3), {sigma, reflect, pixels});
    SAGE_CALL(gaussian_low_pass<T>)
    (plan->view(), data<T>(images), images.size(0) * images.size(1), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("gaussian_low_pass", TORCH_BOX(&gaussian_low_pass)); }

}  // namespace sage_fast
