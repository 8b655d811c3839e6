#include "../fuse_frequencies.h"
#include "low_pass.inl"

namespace sage_fast::SAGE_ISA {

// real, inverted [n or 1, c, h, w], edited [n, c, h, w] -> y. With one source its low-pass goes to shared [c, h, w].
template <class T>
void fuse_frequencies(const LowPass<T>& plan, const T* real, const T* inverted, const T* edited,
                      const FuseFrequenciesParams& p, T* shared, T* y) {
  const int64_t w = p.w, size = p.h * w, grain = 1 + 16384 / (size + 1);
  const T more = T(p.gamma1 - 1), less = T(p.gamma2);
  const bool share = p.one_source() && p.n > 1;
  parallel(share ? p.c : p.n * p.c, grain, [&](int64_t begin, int64_t end) {
    LowPassOfPlane<T> low_pass(plan);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t channel = plane % p.c * size, image = plane / p.c;
      const T *from = real + image * p.real_step + channel, *lost = inverted + image * p.inverted_step + channel;
      const T* made = edited + plane * size;
      const auto rows = [=](int64_t first, int64_t count, T* into, int64_t step) {
        for (int64_t r = 0; r < count; ++r) {
          const T* __restrict a = from + (first + r) * w, * __restrict b = lost + (first + r) * w;
          const T* __restrict e = made + (first + r) * w;
          T* __restrict out = into + r * step;
          if (more == 0) {  // what is not finite in edited shows once
            for (int64_t i = 0; i < w; ++i) out[i] = a[i] - less * b[i];
          } else {
            for (int64_t i = 0; i < w; ++i) out[i] = more * e[i] + a[i] - less * b[i];
          }
        }
      };
      low_pass(rows, share ? nullptr : made, (share ? shared : y) + plane * size);
    }
  });
  if (!share) return;
  parallel(p.n * p.c, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* __restrict e = edited + plane * size, * __restrict low = shared + plane % p.c * size;
      T* __restrict out = y + plane * size;
      for (int64_t i = 0; i < size; ++i) out[i] = e[i] + low[i];
    }
  });
}

template void fuse_frequencies(const LowPass<float>&, const float*, const float*, const float*,
                               const FuseFrequenciesParams&, float*, float*);
template void fuse_frequencies(const LowPass<double>&, const double*, const double*, const double*,
                               const FuseFrequenciesParams&, double*, double*);

}  // namespace sage_fast::SAGE_ISA
