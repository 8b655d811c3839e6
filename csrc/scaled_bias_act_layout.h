// The arguments of scaled_bias_act as both devices check and lay them out.
#pragma once

#include <tuple>

#include "scaled_bias_act.h"
#include "tensor.h"

namespace sage_fast {

// Values of t, which is made contiguous and must be of the dtype of sums; null without t.
inline const void* factors_of(std::optional<Tensor>& t, const Tensor& x, int64_t numel, const char* message) {
  if (!t) return nullptr;
  const ScalarType wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(t->scalar_type() == wanted && t->numel() == numel, message);
  if (!t->is_contiguous()) *t = torch::stable::contiguous(*t);
  return values(*t);
}

// Makes the channels of x come last.
inline ScaledBiasActParams scaled_as(Tensor& x, const std::optional<Tensor>& noise, double slope, double gain,
                                     double clamp) {
  require(x.dim() == 4 && (!noise || noise->dim() == 4), "scaled_bias_act: images and noise must have four axes");
  x = torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
  const ScaledBiasActParams p{x.size(0), x.size(2) * x.size(3), x.size(1), noise && noise->size(0) == 1, slope, gain,
                              clamp};
  check(p);
  return p;
}

struct ScaledBiasActFactors {
  const void *scale, *noise, *strength = nullptr, *b = nullptr;

  ScaledBiasActFactors(const ScaledBiasActParams& p, const Tensor& x, std::optional<Tensor>& s,
                       std::optional<Tensor>& map)
      : scale(factors_of(s, x, p.n * p.channels, "scaled_bias_act: scale must be [N, C], in the dtype of sums")),
        noise(factors_of(map, x, p.pixels * (p.shared_noise ? 1 : p.n),
                         "scaled_bias_act: noise must be [1 or N, 1, H, W], in the dtype of sums")) {}
  ScaledBiasActFactors(const ScaledBiasActParams& p, const Tensor& x, std::optional<Tensor>& s,
                       std::optional<Tensor>& map, std::optional<Tensor>& weight, std::optional<Tensor>& bias)
      : ScaledBiasActFactors(p, x, s, map) {
    strength = factors_of(weight, x, 1, "scaled_bias_act: strength must be one number, in the dtype of sums");
    b = factors_of(bias, x, p.channels, "scaled_bias_act: b must be [C], in the dtype of sums");
  }
};

// The results of the backward: the gradient of x, and sums for those of scale (empty without one), b and strength.
struct ScaledBiasActGradients {
  Tensor x, scale, b, strength;

  ScaledBiasActGradients(const ScaledBiasActParams& p, const Tensor& y, bool scaled)
      : x(new_images(y, y.size(0), y.size(1), y.size(2), y.size(3), true)),
        scale(sums(y, scaled ? p.n : 0, p.channels)),
        b(sums(y, p.channels)),
        strength(sums(y, 1)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {x, scale, b, strength}; }

 private:
  // Zeros, to which a CPU's kernel adds; those of a GPU write all sums where there is a pixel.
  template <class... Sizes>
  static Tensor sums(const Tensor& y, Sizes... sizes) {
    const ScalarType dtype = y.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (y.is_cuda() && y.numel() > 0) return torch::stable::new_empty(y, {sizes...}, dtype);
    return torch::stable::new_zeros(y, {sizes...}, dtype);
  }
};

// `images` laid out as y is, channels last, of its size and dtype.
inline void match_images(Tensor& images, const Tensor& y) {
  require(images.dim() == 4 && images.numel() == y.numel() && images.size(1) == y.size(1) &&
              images.scalar_type() == y.scalar_type(),
          "scaled_bias_act_backward: grad and x must match y");
  images = torch::stable::contiguous(images, torch::headeronly::MemoryFormat::ChannelsLast);
}

// What the backward takes and gives: grad and x, which goes with scale, laid out as y is.
struct ScaledBiasActBackward {
  const ScaledBiasActParams p;
  const ScaledBiasActFactors given;
  ScaledBiasActGradients made;

  ScaledBiasActBackward(Tensor& grad, std::optional<Tensor>& x, Tensor& y, std::optional<Tensor>& scale,
                        std::optional<Tensor>& noise, double slope, double gain, double clamp)
      : p(scaled_as(y, noise, slope, gain, clamp)), given(p, y, scale, noise), made(p, y, scale.has_value()) {
    match_images(grad, y);
    require(x.has_value() == scale.has_value(), "scaled_bias_act_backward: x goes with scale");
    if (x) match_images(*x, y);
  }
};

}  // namespace sage_fast
