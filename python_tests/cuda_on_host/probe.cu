// Kernels for the tests of the host itself: each primitive, and what a GPU would leave undefined.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"

namespace sage_fast {
namespace {

// x [n] -> y [n], each block's values reversed by way of shared memory, twice; `barriers`: which of both are there
template <class T, int Threads>
__global__ void reverse(const T* x, T* y, int64_t barriers) {
  __shared__ T first[Threads], second[Threads / 2][2];
  const int i = threadIdx.x;
  for (int64_t from = int64_t{blockIdx.x} * Threads; from < 2 * Threads; from += Threads) {
    first[i] = x[from + i];
    if (barriers & 1) __syncthreads();
    y[from + i] = first[Threads - 1 - i];
    if (barriers & 2) __syncthreads();
  }
  second[i / 2][i % 2] = T(0);
}

enum Misuse { kNone, kDivergence, kMissingLane, kEndedLane, kTwoBarriers, kBehindArray, kTrap };

__global__ void misuse(int64_t what, float* y) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float values[8];
  const int i = threadIdx.x;
  if (what == kDivergence && i < 40) __syncthreads();
  if (what == kMissingLane && i != 3) y[i] = __shfl_xor_sync(0xffffffffu, y[i], 1);
  if (what == kMissingLane && i == 3) __syncthreads();
  if (what == kEndedLane && i == 3) return;
  if (what == kEndedLane) y[i] = __shfl_xor_sync(0xffffffffu, y[i], 1);
  if (what == kTwoBarriers) {
    if (i == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (what == kBehindArray) values[8 + i % 2] = 1;
  if (what == kTrap && i == 5) __trap();
  if (i == 0) memory[0] = 1;
  y[i] = values[i % 8];
}

// y [7, 64]: what each lane of two warps gets of the lanes' numbers
__global__ void lanes(float* y) {
  const int i = threadIdx.x + 16 * (threadIdx.y + 2 * threadIdx.z);
  const float mine = float(i);
  const unsigned all = 0xffffffffu;
  y[i] = __shfl_sync(all, mine, 5);
  y[64 + i] = __shfl_xor_sync(all, mine, 6);
  y[128 + i] = __shfl_down_sync(all, mine, 3, 16);
  y[192 + i] = __shfl_up_sync(all, mine, 3, 16);
  y[256 + i] = float(__ballot_sync(all, i % 3 == 0) & 0xffffu);
  if (i % 32 < 8) y[320 + i] = __shfl_sync(0xffu, mine, 7);
  __syncwarp();
  float of[32];
  host_cuda::exchange(&mine, sizeof(mine), of);
  y[384 + i] = of[31 - i % 32];
}

Tensor probe_reverse(Tensor x, int64_t barriers) {
  Tensor y = torch::stable::empty_like(x);
  with_type(dtype_of(x), [&](auto zero) {
    using T = decltype(zero);
    reverse<T, 96><<<1, 96>>>(data<T>(x), mutable_data<T>(y), barriers);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor probe_misuse(Tensor y, int64_t what) {
  Scope stream(y);
  misuse<<<dim3(1), 64, 16, stream>>>(what, mutable_data<float>(y));
  return y;
}

Tensor probe_lanes(Tensor y) {
  lanes<<<1, dim3(16, 2, 2)>>>(mutable_data<float>(y));
  return y;
}

// x in float16 or bfloat16 and back
Tensor probe_round(Tensor x, bool half) {
  Tensor y = torch::stable::empty_like(x);
  const float* from = data<float>(x);
  float* to = mutable_data<float>(y);
  for (int64_t i = 0, n = x.numel(); i < n; ++i) {
    to[i] = half ? __half2float(__float2half_rn(from[i])) : __bfloat162float(__float2bfloat16_rn(from[i]));
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(sage_fast, m) {
  m.def("probe_reverse(Tensor x, int barriers) -> Tensor");
  m.def("probe_misuse(Tensor y, int what) -> Tensor");
  m.def("probe_lanes(Tensor y) -> Tensor");
  m.def("probe_round(Tensor x, bool half) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) {
  m.impl("probe_reverse", TORCH_BOX(&probe_reverse));
  m.impl("probe_misuse", TORCH_BOX(&probe_misuse));
  m.impl("probe_lanes", TORCH_BOX(&probe_lanes));
  m.impl("probe_round", TORCH_BOX(&probe_round));
}

}  // namespace sage_fast
