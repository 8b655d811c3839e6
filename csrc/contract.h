// What memory safety needs, checked once for both devices. No torch type: callers pass shapes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sage_fast {

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("sage_fast: ") + message);
}

}  // namespace sage_fast
