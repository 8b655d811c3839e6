
#include "low_pass.inl"

namespace sage_fast::SAGE_ISA {

// x [planes, h, w] -> y
template <class T>
void gaussian_low_pass(const LowPass<T>& plan, const T* x, int64_t planes, T* y) {
  const int64_t w = plan.w, size = plan.h * w;
  parallel(planes, 1 + 16384 / (size + 1), [&](int64_t begin, int64_t end) {
    LowPassOfPlane<T> low_pass(plan);
    for (int64_t i = begin; i < end; ++i) {
      const T* in = x + i * size;
      const auto rows = [=](int64_t first, int64_t count, T* into, int64_t step) {
        for (int64_t r = 0; r < count; ++r) std::copy_n(in + (first + r) * w, w, into + r * step);
      };
      low_pass(rows, static_cast<const T*>(nullptr), y + i * size);
    }
  });
}

template void gaussian_low_pass(const LowPass<float>&, const float*, int64_t, float*);
template void gaussian_low_pass(const LowPass<double>&, const double*, int64_t, double*);

}  // namespace sage_fast::SAGE_ISA
