// y = clamp(gain * act(x + b)) and its derivative; clamp < 0: none.
#pragma once

#include <limits>

#include "contract.h"

namespace sage_fast {

// leaky: slope 1 is linear, 0 is relu. The numbers stand in sage_fast/ops/bias_act.py too. The derivative is read off
// y, that of swish, which takes most values twice, off x + b.
enum class Act : int64_t { leaky, tanh, elu, selu, softplus, sigmoid, swish };

struct BiasActParams {
  int64_t outer;              // product of the axes before the bias axis
  int64_t channels;           // length of the bias axis
  int64_t inner;              // product of the axes behind it
  double slope, gain, clamp;  // slope of leaky, scale of elu
  Act act;

  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr double never = std::numeric_limits<double>::quiet_NaN();  // every comparison with it is false
  double floor() const { return slope == 0 ? 0 : -infinity; }                // relu: -inf goes to 0, not to -inf * 0
  double upper_limit() const { return clamp < 0 ? infinity : clamp; }
  // outputs at and beyond which the derivative is zero
  double dead_above() const { return clamp < 0 ? never : clamp; }
  double dead_below() const { return act == Act::leaky && slope == 0 ? 0 : -dead_above(); }
};

constexpr double kSeluScale = 1.0507009873554805, kSeluAlpha = 1.6732632423543772;

inline void check(const BiasActParams& p, int64_t bias_size) {
  require(p.act >= Act::leaky && p.act <= Act::swish, "bias_act: act must be one of the kernels'");
  require(p.gain > 0 && p.slope >= 0, "bias_act: gain must be positive and slope at least 0");
  require(bias_size < 0 || bias_size == p.channels, "bias_act: b must have the length of x along dim");
}

}  // namespace sage_fast
