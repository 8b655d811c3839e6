// The numbers of an epilogue taken from tensors, checked, for the launches of a CUDA synthesis.
#pragma once

#include <cmath>

#include "../synthesis.h"
#include "../synthesis_epilogue.h"
#include "activations.cuh"
#include "common.cuh"

namespace sage_fast {

// Calls f(T{}) for the element type of an activation.
template <class F>
void dispatch_activation(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      require(false, "the epilogues take float32, float16 and bfloat16");
  }
}

inline const float* floats(const Tensor& x, const Tensor& beside, int64_t numel, const char* message) {
  require(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == numel &&
              x.get_device() == beside.get_device() && x.is_cuda(),
          message);
  return data<float>(x);
}

// What y [n, h, w, c] is made of; y is not written without next.
template <class T>
EpilogueArgs<T> epilogue_arguments(int64_t n, int64_t h, int64_t w, int64_t c, const Tensor& x, const Tensor& factor,
                                   const Tensor& bias, const std::optional<Tensor>& noise, double strength,
                                   const std::optional<Tensor>& next, double slope, double gain, double clamp,
                                   const Tensor& y) {
  const char* bad = "epilogue: factor, bias, noise and next_style must be contiguous float32 of x's sizes, beside it";
  EpilogueArgs<T> a{};
  a.n = n, a.h = h, a.w = w, a.c = c;
  require(a.c % kVector<T> == 0 && a.n <= 65535 && a.h > 0 && a.w > 0,
          "epilogue: channels must fill vectors of 16 bytes; at most 65535 samples");
  require(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "epilogue: x must be aligned to 16 bytes");
  a.pitch = factor.dim() == 2 ? factor.size(1) : 0;
  require(a.pitch >= a.c, "epilogue: factor must be [N, at least C]");
  a.x = data<T>(x);
  a.factor = floats(factor, x, a.n * a.pitch, bad);
  a.bias = floats(bias, x, a.c, bad);
  if (noise) {
    a.noise_per_sample = noise->size(0) != 1;
    a.noise = floats(*noise, x, (a.noise_per_sample ? a.n : 1) * a.h * a.w, bad);
  }
  a.strength = float(strength), a.slope = float(slope), a.gain = float(gain);
  a.most = clamp < 0 ? INFINITY : float(clamp);
  if (next) {
    a.next = floats(*next, x, a.n * a.pitch, bad);
    a.y = mutable_data<T>(y);
  }
  return a;
}

// image: [n, channels, h, w] of a, to be written.
template <class T>
ImageArgs image_arguments(const EpilogueArgs<T>& a, const Tensor& weight, const Tensor& bias,
                          const std::optional<Tensor>& skip, const Tensor& image) {
  const char* bad = "epilogue: image weights, bias and skip must be contiguous float32 of the image's sizes";
  const int64_t channels = bias.numel();
  require(channels >= 1 && channels <= kMaxImageChannels, "epilogue: images must have 1 to 4 channels");
  require(!skip || (a.h % 2 == 0 && a.w % 2 == 0), "epilogue: a skip needs even sides");
  return {channels, floats(weight, image, a.n * channels * a.pitch, bad), floats(bias, image, channels, bad),
          skip ? floats(*skip, image, a.n * channels * (a.h / 2) * (a.w / 2), bad) : nullptr,
          mutable_data<float>(image)};
}

}  // namespace sage_fast
