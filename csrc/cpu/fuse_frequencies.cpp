#include "../fuse_frequencies.h"

#include "../fusion.h"
#include "kernels.h"
#include "low_pass_plan.h"

namespace sage_fast {
namespace {

Tensor fuse_frequencies(Tensor real, Tensor inverted, Tensor edited, double gamma1, double gamma2, double sigma) {
  const FuseFrequenciesParams p = fuse_frequencies_params(real, inverted, edited, gamma1, gamma2, sigma);
  Tensor out = torch::stable::empty_like(edited);
  if (edited.numel() == 0) return out;
  Tensor shared = torch::stable::new_empty(edited, {p.one_source() && p.n > 1 ? p.c * p.h * p.w : 0});
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    const auto plan = recent_plan<LowPassPlan<T>>(p.h, p.w, {sigma, false, false});
    SAGE_CALL(fuse_frequencies<T>)
    (plan->view(), data<T>(real), data<T>(inverted), data<T>(edited), p, mutable_data<T>(shared), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("fuse_frequencies", TORCH_BOX(&fuse_frequencies)); }

}  // namespace sage_fast
