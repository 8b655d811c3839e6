#include "../counter_normal.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256;

// samples [n] -> y [n, numel]; one thread four numbers of one sample
__global__ void run(const int64_t* __restrict__ samples, uint64_t seed, uint32_t stream, int64_t n, int64_t numel,
                    float* __restrict__ y) {
  const int64_t blocks = (numel + 3) / 4;
  SAGE_FAST_GRID_STRIDE(i, n * blocks) {
    const int64_t row = i / blocks, block = i % blocks;
    float four[4];
    normals(normal_words(seed, stream, uint64_t(samples[row]), uint32_t(block)), four);
    float* to = y + row * numel + block * 4;
    if (numel % 4 == 0) {
      *reinterpret_cast<float4*>(to) = make_float4(four[0], four[1], four[2], four[3]);
    } else {
      for (int k = 0; k < 4; ++k) {
        if (block * 4 + k < numel) to[k] = four[k];
      }
    }
  }
}

Tensor counter_normal(Tensor samples, int64_t seed, int64_t stream, int64_t numel) {
  require(samples.dim() == 1 && samples.scalar_type() == ScalarType::Long && samples.is_cuda(),
          "counter_normal: samples must be int64 [N]");
  require(stream >= 0 && stream < (int64_t{1} << 32) && numel >= 0 && numel <= (int64_t{1} << 34),
          "counter_normal: stream must have 32 bits and numel be at most 2^34");
  Scope scope(samples);
  samples = torch::stable::contiguous(samples);
  const int64_t n = samples.numel();
  Tensor y = torch::stable::new_empty(samples, {n, numel}, ScalarType::Float);
  if (y.numel() == 0) return y;
  run<<<blocks_for(n * ((numel + 3) / 4), kThreads), kThreads, 0, scope>>>(
      data<int64_t>(samples), uint64_t(seed), uint32_t(stream), n, numel, mutable_data<float>(y));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("counter_normal", TORCH_BOX(&counter_normal)); }

}  // namespace sage_fast
