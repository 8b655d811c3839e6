#include "../fusion.h"
#include "low_pass.cuh"

namespace sage_fast {
namespace {

// What the low-pass is taken of, put together as it is loaded: (gamma1 - 1) edited + real - gamma2 inverted.
template <class T, bool kEdited>
struct Change {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocks = 2;  // 80 registers would spill there
#else
  static constexpr int kBlocks = sizeof(T) == 4 && !kEdited ? 3 : 2;
#endif
  static constexpr bool kLast = false;
  template <int V>
  struct Raw {
    Pack<T, V> real, inverted, edited;  // edited: where it counts
  };
  struct At {
    const T *real, *inverted, *edited;
  };

  const T *real, *inverted, *edited;
  int64_t real_step, inverted_step, channels, size;  // size: of a plane
  T more, less;

  bool aligned() const { return is_aligned(real) && is_aligned(inverted) && is_aligned(edited); }
  __device__ At at(int64_t plane) const {
    const int64_t image = plane / channels, of_image = plane % channels * size;
    return {real + image * real_step + of_image, inverted + image * inverted_step + of_image, edited + plane * size};
  }
  template <int V>
  __device__ static Raw<V> fetch(const At& from, int64_t i) {
    Raw<V> raw;
    raw.real = read_once(reinterpret_cast<const Pack<T, V>*>(from.real + i));
    raw.inverted = read_once(reinterpret_cast<const Pack<T, V>*>(from.inverted + i));
    if constexpr (kEdited) raw.edited = read_pack(reinterpret_cast<const Pack<T, V>*>(from.edited + i));
    return raw;
  }
  template <int V>
  __device__ Pack<T, V> value(const Raw<V>& raw) const {
    Pack<T, V> y;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      y.v[k] = raw.real.v[k] - less * raw.inverted.v[k];
      if constexpr (kEdited) y.v[k] = more * raw.edited.v[k] + y.v[k];
    }
    return y;
  }
};

Tensor fuse_frequencies(Tensor real, Tensor inverted, Tensor edited, double gamma1, double gamma2, double sigma) {
  const FuseFrequenciesParams p = fuse_frequencies_params(real, inverted, edited, gamma1, gamma2, sigma);
  Scope stream(edited);
  if (edited.numel() == 0) return torch::stable::empty_like(edited);
  const int64_t count = p.one_source() ? p.n : 1, images = p.n / count;
  Tensor out = edited;
  dispatch(edited, [&](auto zero) {
    using T = decltype(zero);
    const auto of = [&](auto load) {
      load = {data<T>(real), data<T>(inverted), data<T>(edited), p.real_step, p.inverted_step,
              p.c,           p.h * p.w,         T(p.gamma1 - 1), T(p.gamma2)};
      out = low_pass<T>(edited, load, images * p.c, p.h, p.w, {sigma, false, false}, stream, data<T>(edited), count);
    };
    if (T(p.gamma1 - 1) == 0) {
      of(Change<T, false>());
    } else {
      of(Change<T, true>());
    }
  });
  return torch::stable::view(out, {p.n, p.c, p.h, p.w});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("fuse_frequencies", TORCH_BOX(&fuse_frequencies)); }

}  // namespace sage_fast
