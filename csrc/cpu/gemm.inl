// The product at the heart of the transformed convolutions: a few rows times a panel two vectors wide.

#pragma once

#include "transforms.inl"

namespace sage_fast::SAGE_ISA {

#if SAGE_VECTOR_BYTES == 64
constexpr int kMaxRows = 12;  // x 2 sums, 2 of the panel: 26 of 32 registers
#elif defined(__x86_64__)
constexpr int kMaxRows = 6;  // x 2 sums, 2 of the panel and 1 broadcast: 15 of 16 registers
#else
constexpr int kMaxRows = 4;
#endif
constexpr int64_t kLanes = Vector<float>::lanes;
constexpr int64_t kPanel = 2 * kLanes;  // columns of a panel

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// From one point's matrix to the next. An odd number of cache lines: powers of two would fight for the same sets.
struct Pitches {
  int64_t v, m, u;
};

// How numbers of the transform's domain are stored; sums are float32 always.
struct Fp32Products {
  using type = float;
  static constexpr int64_t pair = 1;  // values multiplied by one instruction's lane
  static void put(Vector<float>::type v, float* to) { store<float>(v, to); }
  static void put_weights(const V* v, float* to) { store<float>(v[0], to); }
};

// From the panels of one matrix of weights to the next's, a cache line apart.
template <class P>
inline int64_t packed_pitch(int64_t depth, int64_t panels) {
  return panels * depth * kPanel + 64 / int64_t(sizeof(typename P::type));
}

// c [Rows, kPanel] (pitch ldc) = a [Rows, depth] (pitch lda) x b [depth, kPanel]
template <int Rows>
inline void micro_kernel(const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc) {
  Vector<float>::type sum[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<float>::type b0 = load(b), b1 = load(b + kLanes);
    b += kPanel;
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float x = a[r * lda + k];
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    store<float>(sum[r][0], c + r * ldc);
    store<float>(sum[r][1], c + r * ldc + kLanes);
  }
}

#ifdef SAGE_BF16
// Words of one number of each
inline Words side_by_side(Halves low, Halves high) {
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Two bfloat16 a lane: the panel holds pairs of neighbouring depths side by side.
struct Bf16Products {
  using type = uint16_t;
  static constexpr int64_t pair = 2;
  static void put(Vector<float>::type v, uint16_t* to) { store_as<float>(v, reinterpret_cast<BFloat16*>(to)); }
  static void put_weights(const V* v, uint16_t* to) {  // those of two neighbouring depths, side by side
    store<uint32_t>(side_by_side(narrow(v[0], BFloat16()), narrow(v[1], BFloat16())), reinterpret_cast<uint32_t*>(to));
  }
};

// sum [Rows, kPanel] = a [Rows, depth] (pitch lda) x b [depth / 2][kPanel, 2]
template <int Rows>
inline void sum_pairs(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t depth, __m512 (&sum)[Rows][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 2 * kLanes);
    b += 2 * kPanel;
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * lda + k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
    }
  }
}

template <int Rows>
inline void micro_kernel(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t depth, float* c, int64_t ldc) {
  __m512 sum[Rows][2];
  sum_pairs<Rows>(a, lda, b, depth, sum);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(c + r * ldc, sum[r][0]);
    _mm512_storeu_ps(c + r * ldc + kLanes, sum[r][1]);
  }
}
#endif

template <int Rows, class T>
inline void rows_times_panel(int64_t rows, const T* a, int64_t lda, const T* b, int64_t depth, float* c, int64_t ldc) {
  if (rows == Rows) return micro_kernel<Rows>(a, lda, b, depth, c, ldc);
  if constexpr (Rows > 1) rows_times_panel<Rows - 1>(rows, a, lda, b, depth, c, ldc);
}

// For each point: m [rows, panels * kPanel] = v [rows, depth] x the u [panels][depth, kPanel] of its weights; `pitches`
// are those from one point's v and m, and from one u, to the next. A task takes one panel, which stays in the
// second-level cache while the rows pass by; points that share it are neighbours.
template <class P, class F>
void multiply(const typename P::type* v, const typename P::type* u, int64_t rows, int64_t depth, int64_t panels,
              float* m, const Pitches& pitch) {
  static constexpr PointOrder<F> order;
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows, block = (rows + blocks - 1) / blocks;
  const int64_t work = rows * depth * kPanel;
  parallel(order.points * panels, 1 + 400000 / (work + 1), [=, &pitch](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t matrix = order.matrix[task / panels], first = order.first[matrix];
      const int64_t sharing = order.first[matrix + 1] - first, at = task - first * panels;
      const int64_t panel = at / sharing, point = order.point[first + at % sharing];
      const typename P::type* a = v + point * pitch.v;
      const typename P::type* b = u + matrix * pitch.u + panel * depth * kPanel;
      float* c = m + point * pitch.m + panel * kPanel;
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = rows - row < block ? rows - row : block;
        rows_times_panel<kMaxRows>(count, a + row * depth, depth, b, depth, c + row * panels * kPanel, panels * kPanel);
      }
    }
  });
}

// c [Rows, kPanel] (pitch ldc) += the sum over `count` rows k of a [count, Rows] (pitch lda), transposed, x b [count,
// kPanel]
template <int Rows>
inline void outer_kernel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c,
                         int64_t ldc) {
  Vector<float>::type sum[Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    sum[r][0] = load(c + r * ldc);
    sum[r][1] = load(c + r * ldc + kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    const Vector<float>::type b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      sum[r][0] += a[r] * b0;
      sum[r][1] += a[r] * b1;
    }
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    store<float>(sum[r][0], c + r * ldc);
    store<float>(sum[r][1], c + r * ldc + kLanes);
  }
}

template <int Rows>
inline void outer_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c,
                       int64_t ldc) {
  if (rows == Rows) return outer_kernel<Rows>(a, lda, b, ldb, count, c, ldc);
  if constexpr (Rows > 1) outer_rows<Rows - 1>(rows, a, lda, b, ldb, count, c, ldc);
}

// For each matrix of weights of the rows of points [first_row, last_row): du [depth, panels * kPanel] += v [tiles,
// depth], transposed, x m [tiles, panels * kPanel], over the points that share it; v and m begin with the first row's.
template <class F>
void multiply_transposed(const float* v, const float* m, int64_t first_row, int64_t last_row, int64_t tiles,
                         int64_t depth, int64_t panels, float* du, const Pitches& pitch) {
  static constexpr PointOrder<F> order;
  const int64_t width = panels * kPanel, skipped = first_row * F::points;
  const int64_t last_matrix = last_row < F::matrices ? last_row : F::matrices;
  for (int64_t matrix = first_row * F::matrices; matrix < last_matrix * F::matrices; ++matrix) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t k = order.first[matrix]; k < order.first[matrix + 1]; ++k) {
        const float* a = v + (order.point[k] - skipped) * pitch.v;
        const float* b = m + (order.point[k] - skipped) * pitch.m + panel * kPanel;
        for (int64_t c = 0; c < depth; c += kMaxRows) {
          const int64_t rows = depth - c < kMaxRows ? depth - c : kMaxRows;
          outer_rows<kMaxRows>(rows, a + c, depth, b, width, tiles, du + matrix * pitch.u + c * width + panel * kPanel,
                               width);
        }
      }
    }
  }
}

}  // namespace sage_fast::SAGE_ISA
