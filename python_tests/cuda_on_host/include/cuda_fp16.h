// Stands in for CUDA's header: the type, and the roundings that the kernels name.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;

inline float __half2float(__half v) { return v; }
inline __half __float2half_rn(float v) { return v; }
