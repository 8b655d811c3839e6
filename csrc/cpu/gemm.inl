// The product at the heart of the transformed convolutions: a few rows times a panel two vectors wide.

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

// How numbers of the transform's domain are stored; sums are float32 always.
struct Fp32Products {
  using type = float;
  static constexpr int64_t pair = 1;  // values multiplied by one instruction's lane
  static void put(Vector<float>::type v, float* to) { store<float>(v, to); }
  static float round(double v) { return float(v); }
};

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
// Two bfloat16 a lane: the panel holds pairs of neighbouring depths side by side.
struct Bf16Products {
  using type = uint16_t;
  static constexpr int64_t pair = 2;
  static void put(Vector<float>::type v, uint16_t* to) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &half, sizeof(half));
  }
  static uint16_t round(double v) {
    const float f = float(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

template <int Rows>
inline void micro_kernel(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t depth, float* c, int64_t ldc) {
  __m512 sum[Rows][2];
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

// For each of `points` matrices: m [rows, panels * kPanel] = v [rows, depth] x u [panels][depth, kPanel].
// A task takes one panel, which stays in the second-level cache while the rows pass by.
template <class P>
void multiply(const typename P::type* v, int64_t v_pitch, const typename P::type* u, int64_t points, int64_t rows,
              int64_t depth, int64_t panels, float* m, int64_t m_pitch) {
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows, block = (rows + blocks - 1) / blocks;
  const int64_t work = rows * depth * kPanel;
  parallel(points * panels, 1 + 400000 / (work + 1), [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t point = task / panels, panel = task % panels;
      const typename P::type* a = v + point * v_pitch;
      const typename P::type* b = u + task * depth * kPanel;
      float* c = m + point * m_pitch + panel * kPanel;
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t count = rows - row < block ? rows - row : block;
        rows_times_panel<kMaxRows>(count, a + row * depth, depth, b, depth, c + row * panels * kPanel, panels * kPanel);
      }
    }
  });
}

}  // namespace sage_fast::SAGE_ISA
