// The 9 numbers of 3 x 3 filters, which lie side by side in memory, as vectors over filters, and back.

#pragma once

#include "gemm.inl"

namespace sage_fast::SAGE_ISA {
namespace {

#if SAGE_VECTOR_BYTES == 64
// Rows become columns. Four times, row i and row i + 8 interleaved are rows 2 i and 2 i + 1.
inline void transpose(V* rows) {
  V mixed[16];
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = (V)_mm512_permutex2var_ps((__m512)rows[i], low, (__m512)rows[i + 8]);
      mixed[2 * i + 1] = (V)_mm512_permutex2var_ps((__m512)rows[i], high, (__m512)rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
}
#endif

// The first 9 numbers of n rows that lie `stride` apart, as 9 vectors over kLanes rows, zeros beyond the last.
inline void load_taps(const float* from, int64_t stride, V* g, int64_t n = kLanes) {
#if SAGE_VECTOR_BYTES == 64
  V rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = i < n ? load_first<float>(from + i * stride, 9) : V{};
  transpose(rows);
  for (int k = 0; k < 9; ++k) g[k] = rows[k];
#else
  for (int64_t k = 0; k < 9; ++k) {
    for (int64_t l = 0; l < kLanes; ++l) g[k][l] = l < n ? from[l * stride + k] : 0;
  }
#endif
}

// The way back.
inline void store_taps(const V* g, float* to, int64_t stride) {
#if SAGE_VECTOR_BYTES == 64
  V rows[16] = {};
  for (int k = 0; k < 9; ++k) rows[k] = g[k];
  transpose(rows);
  for (int i = 0; i < 16; ++i) store_first<float>(rows[i], to + i * stride, 9);
#else
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int64_t k = 0; k < 9; ++k) to[l * stride + k] = g[k][l];
  }
#endif
}

}  // namespace
}  // namespace sage_fast::SAGE_ISA
