// What happens behind the convolution of a styled layer, for the kernels of csrc/cuda: its numbers, and what one value
// of it is. Activations are [n, h, w, c]; T is their type in memory, all arithmetic is float32.
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

// One pixel of the plane `skip` [h / 2, w / 2] upsampled by [1, 3, 3, 1] / 4 on both axes; zero beyond the edges.
SAGE_FAST_HD float upsampled(const float* skip, int half_h, int half_w, int y, int x) {
  const int y0 = y / 2, y1 = y % 2 ? y0 + 1 : y0 - 1, x0 = x / 2, x1 = x % 2 ? x0 + 1 : x0 - 1;
  const bool has_y = y1 >= 0 && y1 < half_h, has_x = x1 >= 0 && x1 < half_w;
  const float *near = skip + y0 * half_w, *far = skip + y1 * half_w;
  const float at_x0 = .75f * near[x0] + (has_y ? .25f * far[x0] : 0.f);
  const float at_x1 = has_x ? .75f * near[x1] + (has_y ? .25f * far[x1] : 0.f) : 0.f;
  return .75f * at_x0 + .25f * at_x1;
}

// A pixel of image channel k from its sum over channels; the clamp is before the smaller image. Planes have fewer than
// 2^31 pixels: a division of 64 bits would take as long as a pixel's sums over 32 channels.
SAGE_FAST_HD void finish_image(const ImageArgs& to, int64_t sample, int64_t k, int64_t pixel, int64_t h, int64_t w,
                               float most, float sum) {
  const int64_t plane = sample * to.channels + k;
  sum = clamped(sum + to.bias[k], most);
  if (to.skip) {
    const uint32_t y = uint32_t(pixel) / uint32_t(w), x = uint32_t(pixel) - y * uint32_t(w);
    sum += upsampled(to.skip + plane * (h / 2) * (w / 2), int(h / 2), int(w / 2), int(y), int(x));
  }
  to.image[plane * h * w + pixel] = sum;
}

}  // namespace sage_fast
