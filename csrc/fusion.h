// What the launches of the two fusions share: the checks of their images, and their parameters.
#pragma once

#include <cmath>

#include "fuse_frequencies.h"
#include "fuse_pixels.h"
#include "tensor.h"

namespace sage_fast {

// Makes the three images contiguous and returns c h w. Checks shapes, dtypes and devices.
inline int64_t check_source(Tensor& real, Tensor& inverted, Tensor& edited) {
  require(edited.dim() == 4, "fusion: edited must be [N, C, H, W]");
  for (Tensor* image : {&real, &inverted, &edited}) {
    require(image->dim() == 4 && (image->size(0) == 1 || image->size(0) == edited.size(0)),
            "fusion: images must be [N or 1, C, H, W]");
    for (int i = 1; i < 4; ++i) require(image->size(i) == edited.size(i), "fusion: images must have equal shapes");
    require(image->scalar_type() == edited.scalar_type() && image->is_cuda() == edited.is_cuda(),
            "fusion: images must have one dtype and device");
    *image = torch::stable::contiguous(*image);
  }
  return edited.size(1) * edited.size(2) * edited.size(3);
}

inline FuseFrequenciesParams fuse_frequencies_params(Tensor& real, Tensor& inverted, Tensor& edited, double gamma1,
                                                     double gamma2, double sigma) {
  require(sigma > 0 && std::isfinite(sigma), "fuse_frequencies: sigma must be positive and finite");
  const int64_t size = check_source(real, inverted, edited);
  FuseFrequenciesParams p{edited.size(0), edited.size(1), edited.size(2), edited.size(3), size, size, gamma1, gamma2};
  if (real.size(0) == 1) p.real_step = 0;
  if (inverted.size(0) == 1) p.inverted_step = 0;
  return p;
}

inline FusePixelsParams fuse_pixels_params(Tensor& real, Tensor& inverted, Tensor& edited, double beta, int64_t blend,
                                           double blur) {
  require(blend >= 0 && blend <= 2, "fuse_pixels: blend must be 0, 1 or 2");
  require(blur > 0, "fuse_pixels: blur must be positive");
  const int64_t size = check_source(real, inverted, edited);
  FusePixelsParams p{edited.size(0), edited.size(1), edited.size(2), edited.size(3), size, size, beta, Blend(blend)};
  if (real.size(0) == 1) p.real_step = 0;
  if (inverted.size(0) == 1) p.inverted_step = 0;
  const double side = std::exp(-1 / (2 * blur * blur));
  p.side = side / (1 + 2 * side);
  p.middle = 1 / (1 + 2 * side);
  return p;
}

}  // namespace sage_fast
