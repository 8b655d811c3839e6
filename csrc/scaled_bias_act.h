// y = clamp(gain * leaky_relu(x * scale + strength * noise + b)) of images, channels last, and its derivatives; what
// scale, noise and strength a call lacks is left out. clamp < 0: none.
#pragma once

#include <limits>

#include "contract.h"

namespace sage_fast {

struct ScaledBiasActParams {
  int64_t n, pixels, channels;
  bool shared_noise;  // one map for all images
  double slope, gain, clamp;

  double upper_limit() const { return clamp < 0 ? std::numeric_limits<double>::infinity() : clamp; }
  // outputs at and beyond which the derivative is zero
  double dead_above() const { return clamp < 0 ? std::numeric_limits<double>::quiet_NaN() : clamp; }
};

inline void check(const ScaledBiasActParams& p) {
  require(p.gain > 0 && p.slope > 0, "scaled_bias_act: gain and slope must be positive");
}

}  // namespace sage_fast
