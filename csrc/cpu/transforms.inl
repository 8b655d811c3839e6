// Convolutions with fewer multiplications (Winograd 1980; Toom-Cook), in one dimension; two nest.
//
// Plain, 3 taps, M outputs from M + 2 inputs: y_i = sum_k g_k x_{i+k} in M + 2 multiplications (9 become 2.25 a pixel
// for M = 4). Points 0, +-sqrt(1/2), +-sqrt(2), infinity for M = 4: half the rounding of the usual 0, +-1, +-2.
// Up, M inputs to 2 M + 1 values of the transposed convolution of stride 2, z_{2i+k} += g_k x_i: even places are a
// product of polynomials of length M and 2 in M + 1 multiplications, odd places are x_i g_1. Neighbouring tiles add up
// in the one place that they share. Points +-1/2, +-3/2, infinity for M = 4; +-1, infinity for M = 2.
// M = 2 is for bfloat16: there M = 4 would lose five times what rounding loses, M = 2 one and a half times.
// The convolution of stride 2 is the transpose of Up: each of its maps is one of Up's, transposed.
//
// `matrices`: how many of the points have weights of their own; the odd places of Up share their last.

#pragma once

namespace sage_fast::SAGE_ISA {

using V = Vector<float>::type;

template <int M, bool Up>
struct Transform;

template <>
struct Transform<4, false> {
  static constexpr int tile = 4, inputs = 6, points = 6, outputs = 4, matrices = 6;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  // rows of G: g evaluated at a point, over the product of its distances to the other points
  static constexpr double G[6][3] = {{1, 0, 0},
                                     {-2. / 3, -2. / 3 * double(a), -1. / 3},
                                     {-2. / 3, 2. / 3 * double(a), -1. / 3},
                                     {1. / 6, 1. / 6 * double(b), 1. / 3},
                                     {1. / 6, -1. / 6 * double(b), 1. / 3},
                                     {0, 0, 1}};
  static inline void forward(const V* x, V* v) {
    const V e1 = x[4] - 2.f * x[2], o1 = a * x[3] - b * x[1];  // 2 a = b
    const V e2 = x[4] - .5f * x[2], o2 = b * x[3] - a * x[1];  // b / 2 = a
    v[0] = x[4] - 2.5f * x[2] + x[0];
    v[1] = e1 + o1;
    v[2] = e1 - o1;
    v[3] = e2 + o2;
    v[4] = e2 - o2;
    v[5] = x[5] - 2.5f * x[3] + x[1];
  }
  static inline void inverse(const V* m, V* y) {
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = a * d1 + b * d2;
    y[2] = .5f * s1 + 2.f * s2;
    y[3] = (.5f * a) * d1 + (2.f * b) * d2 + m[5];
  }
  static inline void transposed_inverse(const V* y, V* m) {
    const V e1 = y[0] + .5f * y[2], o1 = a * (y[1] + .5f * y[3]), e2 = y[0] + 2.f * y[2], o2 = b * (y[1] + 2.f * y[3]);
    m[0] = y[0];
    m[1] = e1 + o1;
    m[2] = e1 - o1;
    m[3] = e2 + o2;
    m[4] = e2 - o2;
    m[5] = y[3];
  }
};

template <>
struct Transform<2, false> {
  static constexpr int tile = 2, inputs = 4, points = 4, outputs = 2, matrices = 4;
  static constexpr double G[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  static inline void forward(const V* x, V* v) {
    v[0] = x[0] - x[2];
    v[1] = x[2] + x[1];
    v[2] = x[2] - x[1];
    v[3] = x[3] - x[1];
  }
  static inline void inverse(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

template <>
struct Transform<4, true> {
  static constexpr int tile = 4, inputs = 4, points = 9, outputs = 9, matrices = 6;
  static constexpr float p = .5f, q = 1.5f;  // q^2 - p^2 = 2
  // even places: g_0 + t g_2, halved at the finite points; odd places: g_1
  static constexpr double G[6][3] = {{.5, 0, .25}, {.5, 0, -.25}, {.5, 0, .75}, {.5, 0, -.75}, {0, 0, 1}, {0, 1, 0}};
  static inline void forward(const V* x, V* v) {
    const V e1 = x[0] + (p * p) * x[2], o1 = p * x[1] + (p * p * p) * x[3];
    const V e2 = x[0] + (q * q) * x[2], o2 = q * x[1] + (q * q * q) * x[3];
    v[0] = e1 + o1;
    v[1] = e1 - o1;
    v[2] = e2 + o2;
    v[3] = e2 - o2;
    v[4] = x[3];
    for (int i = 0; i < 4; ++i) v[5 + i] = x[i];
  }
  static inline void inverse(const V* m, V* z) {
    const V last = m[4];
    const V e1 = m[0] + m[1] - (p * p * p * p) * last, o1 = (m[0] - m[1]) * (1 / p);
    const V e2 = m[2] + m[3] - (q * q * q * q) * last, o2 = (m[2] - m[3]) * (1 / q);
    const V s2 = .5f * (e2 - e1), s3 = .5f * (o2 - o1);
    z[0] = e1 - (p * p) * s2;
    z[2] = o1 - (p * p) * s3;
    z[4] = s2;
    z[6] = s3;
    z[8] = last;
    for (int i = 0; i < 4; ++i) z[2 * i + 1] = m[5 + i];
  }
  static inline void transposed_inverse(const V* z, V* m) {
    const V s2 = .5f * (z[4] - (p * p) * z[0]), s3 = .5f * (z[6] - (p * p) * z[2]);
    const V e1 = z[0] - s2, o1 = (z[2] - s3) * (1 / p), o2 = s3 * (1 / q);
    m[0] = e1 + o1;
    m[1] = e1 - o1;
    m[2] = s2 + o2;
    m[3] = s2 - o2;
    m[4] = z[8] - (p * p * p * p) * e1 - (q * q * q * q) * s2;
    for (int i = 0; i < 4; ++i) m[5 + i] = z[2 * i + 1];
  }
  static inline void transposed_forward(const V* v, V* x) {
    const V e1 = v[0] + v[1], o1 = p * (v[0] - v[1]), e2 = v[2] + v[3], o2 = q * (v[2] - v[3]);
    x[0] = e1 + e2 + v[5];
    x[1] = o1 + o2 + v[6];
    x[2] = (p * p) * e1 + (q * q) * e2 + v[7];
    x[3] = (p * p) * o1 + (q * q) * o2 + v[4] + v[8];
  }
};

template <>
struct Transform<2, true> {
  static constexpr int tile = 2, inputs = 2, points = 5, outputs = 5, matrices = 4;
  static constexpr double G[4][3] = {{.5, 0, .5}, {.5, 0, -.5}, {0, 0, 1}, {0, 1, 0}};
  static inline void forward(const V* x, V* v) {
    v[0] = x[0] + x[1];
    v[1] = x[0] - x[1];
    v[2] = v[4] = x[1];
    v[3] = x[0];
  }
  static inline void inverse(const V* m, V* z) {
    z[0] = m[0] + m[1] - m[2];
    z[2] = m[0] - m[1];
    z[4] = m[2];
    z[1] = m[3];
    z[3] = m[4];
  }
};

// The points of a transform in two dimensions, those with equal weights side by side.
template <class F>
struct PointOrder {
  static constexpr int64_t points = F::points * F::points, matrices = F::matrices * F::matrices;
  int16_t point[points], matrix[points], first[matrices + 1];

  constexpr PointOrder() : point(), matrix(), first() {
    int16_t n = 0;
    for (int64_t m = 0; m < matrices; ++m) {
      first[m] = n;
      for (int64_t i = 0; i < F::points; ++i) {
        for (int64_t j = 0; j < F::points; ++j) {
          if (weights_of(i) * F::matrices + weights_of(j) != m) continue;
          matrix[n] = int16_t(m);
          point[n++] = int16_t(i * F::points + j);
        }
      }
    }
    first[matrices] = n;
  }
  static constexpr int64_t weights_of(int64_t i) { return i < F::matrices ? i : F::matrices - 1; }
};

}  // namespace sage_fast::SAGE_ISA
