// y = clamp(gain * leaky(x + b, slope)) and its derivative. slope 1: linear, 0: relu; clamp < 0: none; gain > 0.
#pragma once

#include "contract.h"

namespace sage_fast {

struct BiasActParams {
  int64_t outer;     // product of the axes before the bias axis
  int64_t channels;  // length of the bias axis
  int64_t inner;     // product of the axes behind it
  double slope, gain, clamp;
};

inline void check(const BiasActParams& p, int64_t bias_size) {
  require(p.gain > 0, "bias_act: gain must be positive");
  require(bias_size < 0 || bias_size == p.channels, "bias_act: b must have the length of x along dim");
}

}  // namespace sage_fast
