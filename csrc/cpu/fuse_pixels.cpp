#include "../fuse_pixels.h"

#include "../fusion.h"
#include "kernels.h"

namespace sage_fast {
namespace {

Tensor fuse_pixels(Tensor real, Tensor inverted, Tensor edited, std::optional<Tensor> low, double beta, int64_t blend,
                   double blur) {
  const FusePixelsParams p = fuse_pixels_params(real, inverted, edited, low, beta, blend, blur);
  Tensor out = torch::stable::empty_like(edited);
  if (edited.numel() == 0) return out;
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(fuse_pixels<T>)(data<T>(real), data<T>(inverted), data<T>(edited), low ? data<T>(*low) : nullptr, p,
                              mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("fuse_pixels", TORCH_BOX(&fuse_pixels)); }

}  // namespace sage_fast
