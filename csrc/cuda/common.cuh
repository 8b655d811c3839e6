// What the CUDA launches share: stream, device guard, grid sizes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "../tensor.h"

namespace sage_fast {

// Makes the tensor's device current for this scope and gives torch's current stream on it.
class Scope {
 public:
  explicit Scope(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#ifdef SAGE_FAST_ON_HOST  // few, so that the loops over what a grid does not hold have rounds in small tests
constexpr int64_t kMostBlocks = 3, kMostPlanes = 2, kManyWarps = 16;
#else
constexpr int64_t kMostBlocks = int64_t{1} << 20, kMostPlanes = 65535, kManyWarps = 2048;
#endif
// kManyWarps: with that many all multiprocessors have loads under way; a warp may do more, rather than be one of more

// Bytes of dynamic shared memory that any kernel may have; more are for those that were allowed it.
constexpr int kUsuallyShared = 48 << 10;

// The most that a block may have on the current device: 163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120, 227 KiB on
// sm_90.
inline int most_shared() {
  int device = 0, most = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return most;
}

// Allows a kernel so many bytes on the current device. They must be the same in all calls for a kernel there, whatever
// a launch takes: another thread may be between its own call and its launch.
template <class... Args>
void allow_shared(void (*kernel)(Args...), int bytes) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Blocks of a grid-stride loop over n items.
inline unsigned blocks_for(int64_t n, int threads) {
  return static_cast<unsigned>(std::min<int64_t>((n + threads - 1) / threads, kMostBlocks));
}

// Depth of a grid whose blocks stride over n planes.
inline unsigned depth_for(int64_t n) { return static_cast<unsigned>(std::min<int64_t>(n, kMostPlanes)); }

#define SAGE_FAST_GRID_STRIDE(i, n)                                                                                   \
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, stride = int64_t{gridDim.x} * blockDim.x; i < (n); \
       i += stride)

// What sums of T are made in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// N neighbours, in one load or store.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <class T>
constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

// Whether packs of 16 bytes may begin at p.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One load of a pack, whatever of it is used when.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> read_pack(const Pack<T, N>* from) {
  Pack<T, N> to;
  if constexpr (sizeof(to) == 16) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    std::memcpy(&to, &raw, sizeof(to));
  } else {
    to = *from;
  }
  return to;
}

// The same, of what is not read again: it leaves the L2 cache to the rest.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> read_once(const Pack<T, N>* from) {
  Pack<T, N> to;
  if constexpr (sizeof(to) == 16) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    std::memcpy(&to, &raw, sizeof(to));
  } else {
    to = *from;
  }
  return to;
}

// Calls f(T{}) for the scalar type named by dtype.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(torch::headeronly::BFloat16{});
    case Dtype::float16:
      return f(torch::headeronly::Half{});
  }
}

}  // namespace sage_fast
