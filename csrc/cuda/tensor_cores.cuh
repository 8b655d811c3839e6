// The instructions of a tensor-core product on sm_80 and later, a function each: copies into shared memory that run by
// themselves, loads of matrix fragments, products. All lanes of a warp call them together.
//
// A fragment's rows are 32 bytes along K: 16 values of bfloat16 or float16, 8 of float32 (TF32 products), so all types
// have one layout (PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8"). With g = lane / 4, t = lane % 4 and
// words of 4 bytes:
//   A [16, 32 bytes]: a[0] row g word t, a[1] row g + 8 word t, a[2] row g word t + 4, a[3] row g + 8 word t + 4
//   B [8, 32 bytes], K along a row: b[0] row g word t, b[1] row g word t + 4
//   sums [16, 8]: row g columns 2 t and 2 t + 1, then row g + 8
// With SAGE_FAST_ON_HOST the same in plain C++, the lanes meeting in host_cuda::exchange: for tests without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef SAGE_FAST_ON_HOST
#include <deque>
#include <utility>
#include <vector>
#endif

namespace sage_fast {

#ifndef SAGE_FAST_ON_HOST

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// 16 bytes into shared memory, zeros unless wanted; seen by others after commit, wait and a barrier.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until all groups of this thread but the last N are there.
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane i names row i % 8 of matrix i / 8 and gets word i % 4 of row i / 4 of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void mma_m16n8k16(__nv_bfloat16, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16(__half, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// TF32: of float32 operands the sign, the exponent and 10 bits of the fraction; the hardware drops the rest.
__device__ __forceinline__ void mma_m16n8k8(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A float32 to the nearest of TF32, ties away from zero.
__device__ __forceinline__ uint32_t rounded_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

#else

// Copies of each thread of a block that it has not waited for. Until it does, what is there is not a number, so that a
// reader who comes too early, and one whose row is taken too early, both show.
struct Copy {
  void* to;
  const void* from;
};
struct CopyGroups {
  std::deque<std::vector<Copy> > closed;
  std::vector<Copy> open;
};
inline CopyGroups& copies_of_thread() {
  static CopyGroups of[1024];
  return of[threadIdx.x];
}

inline void copy_async_16(void* to, const void* from, bool wanted) {
  std::memset(to, 0xFF, 16);
  copies_of_thread().open.push_back({to, wanted ? from : nullptr});
}
inline void commit_copies() {
  CopyGroups& groups = copies_of_thread();
  groups.closed.push_back(std::exchange(groups.open, {}));
}
template <int N>
void wait_copies() {
  for (auto& groups = copies_of_thread().closed; groups.size() > N; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
  }
}

inline void load_matrix_x4(uint32_t (&to)[4], const void* row) {
  const void* rows[32];
  host_cuda::exchange(&row, sizeof(row), rows);
  const int lane = int(threadIdx.x) % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&to[matrix], static_cast<const char*>(rows[8 * matrix + lane / 4]) + 4 * (lane % 4), 4);
  }
}

// What a lane holds of A and B.
struct Fragments {
  uint32_t a[4], b[2];
};

// sums += A B^T, for this lane's four; value(word, i): the i-th of the kPerWord values in a word.
template <int kPerWord, class Value>
void mma_on_host(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value&& value) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  Fragments all[32];
  host_cuda::exchange(&mine, sizeof(mine), all);
  const int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int word = 0; word < 8; ++word) {
      const uint32_t left = all[row % 8 * 4 + word % 4].a[row / 8 + 2 * (word / 4)];
      const uint32_t right = all[column * 4 + word % 4].b[word / 4];
      for (int k = 0; k < kPerWord; ++k) sum += value(left, k) * value(right, k);
    }
    sums[i] += sum;
  }
}

template <class T>
void mma_m16n8k16(T, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_on_host<2>(sums, a, b0, b1, [](uint32_t word, int i) {
    T pair[2];
    std::memcpy(pair, &word, 4);
    return float(pair[i]);
  });
}

inline void mma_m16n8k8(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_on_host<1>(sums, a, b0, b1, [](uint32_t word, int) {
    word &= 0xffffe000u;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  });
}

inline uint32_t rounded_to_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

#endif

// sums [16, 8] += A [16, 32 bytes of T] times B [8, 32 bytes of T] transposed.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8(sums, a, b0, b1);
  } else {
    mma_m16n8k16(T{}, sums, a, b0, b1);
  }
}

}  // namespace sage_fast
