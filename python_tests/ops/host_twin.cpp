// The thread functions of the CUDA kernels, called in loops in place of a grid; for tests on machines without a GPU.
#include <cmath>

#include "counter_normal.h"
#include "synthesis_epilogue.h"

using namespace sage_fast;

namespace {

constexpr int V = 4;

struct Memory {
  void load(const float* from, float (&to)[V]) const { read(from, to); }
  void store(float* to, const float (&from)[V]) const {
    for (int i = 0; i < V; ++i) to[i] = from[i];
  }
};

EpilogueArgs<float> arguments(const int64_t* sizes, const float* numbers, const float* x, const float* factor,
                              const float* bias, const float* noise, const float* next, float* y) {
  const float most = numbers[3] < 0 ? INFINITY : numbers[3];
  return {sizes[0], sizes[1],      sizes[2],   sizes[3], sizes[4],   x,          factor, bias,
          noise,    sizes[5] != 0, numbers[4], next,     numbers[0], numbers[1], most,   y};
}

}  // namespace

// sizes: n, h, w, c, pitch, noise per sample; numbers: slope, gain, 0, clamp, strength
extern "C" void twin_blur(const int64_t* sizes, const float* numbers, const float* x, const float* factor,
                          const float* bias, const float* noise, const float* next, int64_t rows, float* y) {
  const auto a = arguments(sizes, numbers, x, factor, bias, noise, next, y);
  const int64_t vectors = a.c / V, pairs = a.w / 2, strips = (a.h + rows - 1) / rows;
  for (int64_t i = 0; i < a.n * strips * pairs * vectors; ++i) {
    const int64_t y0 = i / (vectors * pairs) % strips * rows, y1 = y0 + rows < a.h ? y0 + rows : a.h;
    blur_columns<V>(a, i / (vectors * pairs * strips), i % vectors * V, i / vectors % pairs * 2, y0, y1, Memory{});
  }
}

// One thread after the other in place of the groups of csrc/cuda/synthesis.cu; their sums are added where they meet.
extern "C" void twin_styled(const int64_t* sizes, const float* numbers, const float* x, const float* factor,
                            const float* bias, const float* noise, const float* next, int64_t channels,
                            const float* weight, const float* image_bias, const float* skip, float* y, float* image) {
  const auto a = arguments(sizes, numbers, x, factor, bias, noise, next, y);
  const int64_t pixels = a.h * a.w;
  for (int64_t sample = 0; sample < a.n; ++sample) {
    for (int64_t channel = 0; channel < a.c; channel += V) {
      const ChannelNumbers<V> mine(a, sample, channel);
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        float v[V];
        Memory{}.load(a.x + (sample * pixels + pixel) * a.c + channel, v);
        activate(a, mine, noise_at(a, sample, pixel), v);
        for (int64_t k = 0; k < channels; ++k) {
          float w[V];
          read(weight + (sample * channels + k) * a.pitch + channel, w);
          image[(sample * channels + k) * pixels + pixel] += dot(w, v);
        }
        if (!a.next) continue;
        for (int i = 0; i < V; ++i) v[i] *= mine.next[i];
        Memory{}.store(a.y + (sample * pixels + pixel) * a.c + channel, v);
      }
    }
    for (int64_t i = 0; i < channels * pixels; ++i) {
      const int64_t plane = sample * channels + i / pixels, pixel = i % pixels;
      float& sum = image[plane * pixels + pixel];
      sum += image_bias[i / pixels];
      if (skip) sum += upsampled(skip + plane * (pixels / 4), a.h / 2, a.w / 2, pixel / a.w, pixel % a.w);
    }
  }
}

extern "C" void twin_philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Words words = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = words.v[i];
}

extern "C" void twin_words(uint64_t seed, uint32_t stream, uint64_t sample, int64_t blocks, uint32_t* out, float* to) {
  for (int64_t block = 0; block < blocks; ++block) {
    const Words words = normal_words(seed, stream, sample, uint32_t(block));
    float four[4];
    normals(words, four);
    for (int i = 0; i < 4; ++i) out[4 * block + i] = words.v[i], to[4 * block + i] = four[i];
  }
}

extern "C" void twin_box_muller(const uint32_t* words, int64_t n, float* radius, float* cosine, float* sine) {
  for (int64_t i = 0; i < n; ++i) {
    radius[i] = box_muller_radius(words[i]);
    box_muller_turn(words[i], cosine[i], sine[i]);
  }
}
