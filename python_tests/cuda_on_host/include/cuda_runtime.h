// Stands in for CUDA's header of this name where csrc/cuda is compiled by a C++ compiler, for tests without a GPU: a
// launch runs its blocks one after the other, each thread of a block as a fiber of its own (blocks.cpp). The launches
// and the __shared__ arrays are rewritten before (kernels_on_host.py); everything else is compiled as it stands.
#pragma once

#include <math.h>  // in the global namespace, as kernels call them

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define SAGE_FAST_ON_HOST

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// One launch at a time: these are set before a thread goes on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace sage_fast::host_cuda {

using Where = std::source_location;

// Of the running thread: waits until all threads of the block are here.
void barrier(const Where& where = Where::current());

// Waits until all lanes of `mask` are here with `bytes` of their own, and gives every one those of all: all32 [32,
// bytes]. Lanes out of the mask, or beyond the end of the block, give bytes of 0xFF.
void exchange(const void* mine, size_t bytes, void* all32, unsigned mask = 0xffffffffu,
              const Where& where = Where::current());

// The block's array of this address of a variable; fresh memory is all 0xFF, which is NaN.
void* shared_array(const void* variable, size_t bytes);
void* dynamic_shared_array();

[[noreturn]] void trap(const Where& where = Where::current());

struct Config {
  dim3 grid, block;
  size_t shared;

  Config(dim3 grid, dim3 block, size_t shared = 0, void* = nullptr) : grid(grid), block(block), shared(shared) {}
};

void run(const Config& config, const char* kernel, const std::function<void()>& thread, const Where& where);

// Arguments are copied once, as by a launch, and then for every thread.
template <class Kernel, class... Args>
void launch(const Where& where, const char* name, const Config& config, const Kernel& kernel, Args... args) {
  run(config, name, [&] { kernel(args...); }, where);
}

void allow_shared(size_t bytes);  // dynamic shared memory of the next launch
size_t most_shared();             // of the device

template <class T>
struct Lanes {
  T of[32];

  Lanes(unsigned mask, const T& mine, const Where& where) { exchange(&mine, sizeof(T), of, mask, where); }
};

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

}  // namespace sage_fast::host_cuda

inline void __syncthreads(const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  sage_fast::host_cuda::barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  sage_fast::host_cuda::Lanes<char>(mask, 0, where);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  const int lane = sage_fast::host_cuda::lane();
  return sage_fast::host_cuda::Lanes<T>(mask, v, where).of[lane / width * width + (source & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                  const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  const int lane = sage_fast::host_cuda::lane(), source = lane ^ bits;
  return sage_fast::host_cuda::Lanes<T>(mask, v, where).of[source / width <= lane / width ? source : lane];
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  const int lane = sage_fast::host_cuda::lane(), source = lane + int(delta);
  return sage_fast::host_cuda::Lanes<T>(mask, v, where).of[source / width == lane / width ? source : lane];
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                 const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  const int lane = sage_fast::host_cuda::lane(), source = lane - int(delta);
  return sage_fast::host_cuda::Lanes<T>(mask, v, where).of[source >= lane / width * width ? source : lane];
}
inline unsigned __ballot_sync(unsigned mask, bool holds,
                              const sage_fast::host_cuda::Where& where = sage_fast::host_cuda::Where::current()) {
  const sage_fast::host_cuda::Lanes<bool> lanes(mask, holds, where);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1 && lanes.of[i] ? 1u : 0u) << i;
  return votes;
}

#define __trap() ::sage_fast::host_cuda::trap()

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
T __ldcs(const T* from) {
  return *from;
}

// What --use_fast_math makes of it: a rounding of the exponent before, which costs digits of what is far from 1.
inline float fast_expf(float x) { return float(std::exp2(double(x * 1.4426950408889634f))); }
#define expf fast_expf

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a bad launch throws
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = int(sage_fast::host_cuda::most_shared()), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(const Kernel&, cudaFuncAttribute, int bytes) {
  sage_fast::host_cuda::allow_shared(size_t(bytes));
  return cudaSuccess;
}

// Tensors of the CPU stand for those of a GPU: what asks torch for one is answered in blocks.cpp, and the ops are
// registered for the CPU under a name of their own.
#define aoti_torch_get_current_cuda_stream sage_fast_host_get_current_cuda_stream
#define aoti_torch_create_device_guard sage_fast_host_create_device_guard
#define aoti_torch_delete_device_guard sage_fast_host_delete_device_guard
#define torch_c10_cuda_check_msg sage_fast_host_cuda_check_msg
#define torch_c10_cuda_free_error_msg sage_fast_host_cuda_free_error_msg

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define is_cuda is_cpu

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(sage_fast_on_host, CPU, m, C10_UID)
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(sage_fast_on_host, m)
