// What the launches of the two fusions share: the checks of their images, and their parameters.
#pragma once

#include <cmath>

#include "fuse_frequencies.h"
#include "fuse_pixels.h"
#include "tensor.h"

namespace sage_fast {

// Makes an image contiguous and returns its values from image to image, 0 for one that all edited images share.
inline int64_t source_step(Tensor& image, const Tensor& edited) {
  require(image.dim() == 4 && edited.dim() == 4 && (image.size(0) == 1 || image.size(0) == edited.size(0)),
          "fusion: images must be [N or 1, C, H, W]");
  for (int i = 1; i < 4; ++i) require(image.size(i) == edited.size(i), "fusion: images must have equal shapes");
  require(image.scalar_type() == edited.scalar_type() && image.is_cuda() == edited.is_cuda() &&
              image.get_device_index() == edited.get_device_index(),
          "fusion: images must have one dtype and device");
  image = torch::stable::contiguous(image);
  return image.size(0) == 1 ? 0 : image.size(1) * image.size(2) * image.size(3);
}

inline FuseFrequenciesParams fuse_frequencies_params(Tensor& real, Tensor& inverted, Tensor& edited, double gamma1,
                                                     double gamma2, double sigma) {
  require(sigma > 0 && std::isfinite(sigma), "fuse_frequencies: sigma must be positive and finite");
  const int64_t real_step = source_step(real, edited), inverted_step = source_step(inverted, edited);
  edited = torch::stable::contiguous(edited);
  return {edited.size(0), edited.size(1), edited.size(2), edited.size(3), real_step, inverted_step, gamma1, gamma2};
}

inline FusePixelsParams fuse_pixels_params(Tensor& real, Tensor& inverted, Tensor& edited, std::optional<Tensor>& low,
                                           double beta, int64_t blend, double blur) {
  require(blend >= 0 && blend <= 2, "fuse_pixels: blend must be 0, 1 or 2");
  require(blur > 0, "fuse_pixels: blur must be positive");
  const int64_t real_step = source_step(real, edited), inverted_step = source_step(inverted, edited);
  const int64_t low_step = low ? source_step(*low, edited) : 0;
  edited = torch::stable::contiguous(edited);
  FusePixelsParams p{edited.size(0), edited.size(1), edited.size(2), edited.size(3), real_step,
                     inverted_step,  low_step,       beta,           Blend(blend)};
  p.set_blur(blur);
  return p;
}

}  // namespace sage_fast
