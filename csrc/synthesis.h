// One pass of a StyleGAN2 synthesis network: what the layers are and where their numbers lie.
//
// Activations are channels last, [n, h, w, pitch], pitch = channels rounded up to whole vectors; the padding channels
// meet weights of zero. Image channels are at most 4.
#pragma once

#include "contract.h"

namespace sage_fast {

constexpr int64_t kMaxImageChannels = 4;

// Modulated 3 x 3 convolution, noise, bias, leaky ReLU. Pointers into tensors that the caller keeps.
struct StyledLayer {
  int64_t c_in, c_out, size;  // size: of the output, in pixels
  bool up;                    // the input is half as large
  bool bf16;                  // products of bfloat16 instead of float32, where the processor has them
  const void* packed;         // weights in the transform's domain, by synthesis_pack
  const float* squares;       // [c_out, c_in] sum over the taps of the squared weights
  const float* affine;        // [c_in, style_dim] from w to the style
  const float* affine_bias;   // [c_in]
  const float* bias;          // [c_out]
  const float* noise;         // [size, size], [n, size, size] or null
  bool noise_per_sample;
  float strength;  // of the noise
};

// Modulated 1 x 1 convolution to the image.
struct ImageLayer {
  int64_t c_in;
  const float* weight;  // [n_channels, c_in]
  const float* affine;
  const float* affine_bias;
  const float* bias;  // [n_channels]
};

// Hears of the layers as they are drawn.
class LayerListener {
 public:
  // index: 0 to n_layers - 1 of a styled layer, n_layers and more of a layer to the image.
  virtual void begins(int64_t index) = 0;
  virtual void ends() = 0;

 protected:
  ~LayerListener() = default;
};

// A layer pair up to `size`: a styled layer, from the second pair on two of them, and one to the image.
struct SynthesisNetwork {
  int64_t n, style_dim, n_latent, n_channels, n_layers, n_images;
  const float* input;          // [c, 4, 4]
  const StyledLayer* layers;   // [n_layers]: conv1, then up and plain by turns
  const ImageLayer* to_image;  // [n_images]: one for each size
  const float* w_plus;         // [n, n_latent, style_dim]
  float slope, gain, clamp;    // of the activation; clamp: of each size's image too, < 0: none
  float* images;               // [n, n_channels, size, size] // output
  LayerListener* listener;
};

struct PackShape {
  int64_t c_out, c_in;
  bool up, bf16;
};

}  // namespace sage_fast
