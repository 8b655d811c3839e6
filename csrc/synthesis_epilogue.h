// What happens behind the convolution of a styled layer: one thread's share of it, for the CUDA kernels and, compiled
// by any C++ compiler, for a test without a GPU.
//
// Activations are [n, h, w, c], c a multiple of the vector. A thread owns one vector of channels and walks over pixels,
// so the numbers that belong to its channels stay in registers. T is the type in memory; all arithmetic is float32.
#pragma once

#include "contract.h"

namespace sage_fast {

// What both kernels read and write; x is [n, h, w, c] for a plain layer and [n, h + 1, w + 1, c] before a blur.
template <class T>
struct EpilogueArgs {
  int64_t n, h, w, c;       // of y
  int64_t pitch;            // of factor, next and image_weight, at least c
  const T* x;               //
  const float* factor;      // [n, pitch] demodulation
  const float* bias;        // [c]
  const float* noise;       // [1 or n, h, w] or null
  bool noise_per_sample;    //
  float strength;           // of the noise
  const float* next;        // [n, pitch] style of the next layer, or null: y is not wanted
  float slope, gain, most;  // of the activation; most: of it and of the layer's image, infinity when there is no clamp
  T* y;                     // [n, h, w, c] activation times next // output
};

// The image of a plain layer: weights times the activation before the next style, plus the upsampled smaller image.
struct ImageArgs {
  int64_t channels;     // 1 to 4
  const float* weight;  // [n, channels, pitch] times the style
  const float* bias;    // [channels]
  const float* skip;    // [n, channels, h / 2, w / 2] or null
  float* image;         // [n, channels, h, w] // output
};

// A vector's worth of one row of numbers.
template <int V>
SAGE_FAST_HD void read(const float* from, float (&to)[V]) {
  for (int i = 0; i < V; ++i) to[i] = from[i];
}

// What a thread keeps of its channels in one sample.
template <int V>
struct ChannelNumbers {
  float factor[V], bias[V], next[V];

  template <class T>
  SAGE_FAST_HD ChannelNumbers(const EpilogueArgs<T>& a, int64_t sample, int64_t channel) {
    read(a.factor + sample * a.pitch + channel, factor);
    read(a.bias + channel, bias);
    if (a.next) {
      read(a.next + sample * a.pitch + channel, next);
    } else {
      for (int i = 0; i < V; ++i) next[i] = 0;
    }
  }
};

template <class T>
SAGE_FAST_HD float noise_at(const EpilogueArgs<T>& a, int64_t sample, int64_t pixel) {
  if (!a.noise) return 0;
  return a.strength * a.noise[(a.noise_per_sample ? sample * a.h * a.w : 0) + pixel];
}

// To [-most, most]; a NaN stays one.
SAGE_FAST_HD float clamped(float v, float most) {
  v = v > most ? most : v;
  return v < -most ? -most : v;
}

// Leaky ReLU times gain, clamped.
SAGE_FAST_HD float activation(float v, float slope, float gain, float most) {
  return clamped((v > 0 ? v : v * slope) * gain, most);
}

// v: convolution in, activation out.
template <class T, int V>
SAGE_FAST_HD void activate(const EpilogueArgs<T>& a, const ChannelNumbers<V>& k, float noise, float (&v)[V]) {
  for (int i = 0; i < V; ++i) v[i] = activation(v[i] * k.factor[i] + (noise + k.bias[i]), a.slope, a.gain, a.most);
}

template <int V>
SAGE_FAST_HD float dot(const float (&a)[V], const float (&b)[V]) {
  float sum = 0;
  for (int i = 0; i < V; ++i) sum += a[i] * b[i];
  return sum;
}

// One pixel of the plane `skip` [h / 2, w / 2] upsampled by [1, 3, 3, 1] / 4 on both axes; zero beyond the edges.
SAGE_FAST_HD float upsampled(const float* skip, int64_t half_h, int64_t half_w, int64_t y, int64_t x) {
  const int64_t y0 = y / 2, y1 = y % 2 ? y0 + 1 : y0 - 1, x0 = x / 2, x1 = x % 2 ? x0 + 1 : x0 - 1;
  const bool has_y = y1 >= 0 && y1 < half_h, has_x = x1 >= 0 && x1 < half_w;
  const float *near = skip + y0 * half_w, *far = skip + y1 * half_w;
  const float at_x0 = .75f * near[x0] + (has_y ? .25f * far[x0] : 0.f);
  const float at_x1 = has_x ? .75f * near[x1] + (has_y ? .25f * far[x1] : 0.f) : 0.f;
  return .75f * at_x0 + .25f * at_x1;
}

// A pixel of image channel k from its sum over channels; the clamp is before the smaller image.
SAGE_FAST_HD void finish_image(const ImageArgs& to, int64_t sample, int64_t k, int64_t pixel, int64_t h, int64_t w,
                               float most, float sum) {
  const int64_t plane = sample * to.channels + k;
  sum = clamped(sum + to.bias[k], most);
  if (to.skip) sum += upsampled(to.skip + plane * (h / 2) * (w / 2), h / 2, w / 2, pixel / w, pixel % w);
  to.image[plane * h * w + pixel] = sum;
}

// How the threads of a block share the pixels of a plain layer: a group of 2^shift threads holds all channels of a
// pixel, a vector each, and kPixels pixels at a time, whose loads are in flight together.
struct PixelGroups {
  static constexpr int kThreads = 256, kPixels = 4;
#ifdef SAGE_FAST_ON_HOST  // few, for several rounds in small tests
  static constexpr int64_t kMostBlocks = 3;
#else
  static constexpr int64_t kMostBlocks = 2048;
#endif
  int shift = 0;

  SAGE_FAST_HD explicit PixelGroups(int64_t vectors) {
    while ((int64_t{1} << shift) < vectors) ++shift;
  }
  SAGE_FAST_HD int size() const { return 1 << shift; }
  SAGE_FAST_HD int slots() const { return kThreads >> shift; }  // groups in a block
  SAGE_FAST_HD int tile() const { return slots() * kPixels; }   // pixels of a round
  SAGE_FAST_HD int lane(int thread) const { return thread & (size() - 1); }
  SAGE_FAST_HD int slot(int thread) const { return thread >> shift; }
  SAGE_FAST_HD int at(int thread, int u) const { return u * slots() + slot(thread); }  // pixel of the tile
  // Sums over channels meet within a warp first: the warps of a group, and where the sums of a pixel's warp lie.
  SAGE_FAST_HD int warps() const { return size() > 32 ? size() / 32 : 1; }
  SAGE_FAST_HD int part(int at, int warp) const { return at * warps() + warp; }

  // Blocks of a sample: enough for every multiprocessor, few enough that what a thread keeps serves many pixels.
  int64_t blocks(int64_t n, int64_t pixels) const {
    const int64_t tiles = (pixels + tile() - 1) / tile(), wanted = kMostBlocks / n > 1 ? kMostBlocks / n : 1;
    return tiles < wanted ? tiles : wanted;
  }
};

// Vertical half of the blur: rows go in one by one, and each completes the output row two above it.
template <int V>
struct BlurWindow {
  float a[V] = {}, b[V] = {}, c[V] = {};  // what is known of the next three outputs

  // row: of the input, blurred along x, in; output out
  SAGE_FAST_HD void push(float (&row)[V]) {
    for (int i = 0; i < V; ++i) {
      const float quarter = .25f * row[i], more = .75f * row[i];
      row[i] = a[i] + quarter;
      a[i] = b[i] + more;
      b[i] = c[i] + more;
      c[i] = quarter;
    }
  }
};

// A thread of the blur: two neighbouring columns from x0 (even), rows [y0, y1) of one sample's vector of channels.
// Memory: load(pointer, float[V]) and store(pointer, float[V]), a vector at a time.
template <int V, class T, class Memory>
SAGE_FAST_HD void blur_columns(const EpilogueArgs<T>& a, int64_t sample, int64_t channel, int64_t x0, int64_t y0,
                               int64_t y1, const Memory& memory) {
  const ChannelNumbers<V> numbers(a, sample, channel);
  const int64_t in_h = a.h + 1, in_w = a.w + 1;
  const T* in = a.x + (sample * in_h * in_w + x0) * a.c + channel;
  T* out = a.y + (sample * a.h * a.w + x0) * a.c + channel;
  BlurWindow<V> left, right;
  for (int64_t row = y0 - 1; row <= y1 + 1; ++row) {
    float to_left[V] = {}, to_right[V] = {};
    if (row >= 0 && row < in_h) {
      const float taps[4] = {.25f, .75f, .75f, .25f};
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int k = 0; k < 5; ++k) {  // columns x0 - 1 to x0 + 3
        const int64_t column = x0 - 1 + k;
        if (column < 0 || column >= in_w) continue;
        float v[V];
        memory.load(in + (row * in_w + k - 1) * a.c, v);
        for (int i = 0; i < V; ++i) {
          if (k < 4) to_left[i] += taps[k < 4 ? k : 0] * v[i];
          if (k > 0) to_right[i] += taps[k > 0 ? k - 1 : 0] * v[i];
        }
      }
    }
    left.push(to_left);
    right.push(to_right);
    const int64_t done = row - 2;
    if (done < y0) continue;
    const int64_t pixel = done * a.w + x0;
    activate(a, numbers, noise_at(a, sample, pixel), to_left);
    activate(a, numbers, noise_at(a, sample, pixel + 1), to_right);
    for (int i = 0; i < V; ++i) {
      to_left[i] *= numbers.next[i];
      to_right[i] *= numbers.next[i];
    }
    memory.store(out + done * a.w * a.c, to_left);
    memory.store(out + (done * a.w + 1) * a.c, to_right);
  }
}

}  // namespace sage_fast
