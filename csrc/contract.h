// What memory safety needs, checked once for both devices. No torch type: callers pass shapes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// Functions that a CUDA kernel shares with a host test.
#ifdef __CUDACC__
#define SAGE_FAST_HD __host__ __device__ __forceinline__
#else
#define SAGE_FAST_HD inline
#endif

namespace sage_fast {

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("sage_fast: ") + message);
}

}  // namespace sage_fast
