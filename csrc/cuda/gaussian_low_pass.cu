#include "low_pass.cuh"

namespace sage_fast {
namespace {

Tensor gaussian_low_pass(Tensor images, double sigma, bool reflect, bool pixels) {
  require(images.dim() == 4, "gaussian_low_pass: images must be [N, C, H, W]");
  require(sigma > 0 && std::isfinite(sigma), "gaussian_low_pass: sigma must be positive and finite");
  Scope stream(images);
  images = torch::stable::contiguous(images);
  if (images.numel() == 0) return torch::stable::empty_like(images);
  const int64_t n = images.size(0), c = images.size(1), h = images.size(2), w = images.size(3);
  Tensor out = images;
  dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const PlainPlanes<T> load{data<T>(images), h * w};
    out = low_pass<T>(images, load, n * c, h, w, {sigma, reflect, pixels}, stream);
  });
  return torch::stable::view(out, {n, c, h, w});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("gaussian_low_pass", TORCH_BOX(&gaussian_low_pass)); }

}  // namespace sage_fast
