// y = clamp(gain * leaky(x + b, slope)) and its derivative. slope 1: linear, 0: relu; clamp < 0: none.
#pragma once

#include <limits>

#include "contract.h"

namespace sage_fast {

struct BiasActParams {
  int64_t outer;     // product of the axes before the bias axis
  int64_t channels;  // length of the bias axis
  int64_t inner;     // product of the axes behind it
  double slope, gain, clamp;

  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr double never = std::numeric_limits<double>::quiet_NaN();  // every comparison with it is false
  double floor() const { return slope == 0 ? 0 : -infinity; }                // relu: -inf goes to 0, not to -inf * 0
  double upper_limit() const { return clamp < 0 ? infinity : clamp; }
  // outputs at and beyond which the derivative is zero
  double dead_above() const { return clamp < 0 ? never : clamp; }
  double dead_below() const { return slope == 0 ? 0 : -dead_above(); }
};

inline void check(const BiasActParams& p, int64_t bias_size) {
  require(p.gain > 0 && p.slope >= 0, "bias_act: gain must be positive and slope at least 0");
  require(bias_size < 0 || bias_size == p.channels, "bias_act: b must have the length of x along dim");
}

}  // namespace sage_fast
