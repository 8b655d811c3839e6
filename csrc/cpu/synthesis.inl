#include "../synthesis.h"
#include "styled_conv.inl"
#include "taps.inl"
#include "workspace.h"

namespace sage_fast::SAGE_ISA {
namespace {

// out[i][r] = sum over k of matrix[r][k] * x[i][k] (+ bias[r]), i below n: every row of the matrix is read once.
template <class Finish>
void rows_dot(const float* matrix, int64_t rows, int64_t width, const float* x, int64_t x_pitch, int64_t n,
              Finish&& finish) {
  parallel(rows, 1 + 65536 / (width * n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = matrix + r * width;
      for (int64_t i = 0; i < n; ++i) {
        const float* in = x + i * x_pitch;
        V sum[4] = {};
        int64_t k = 0;
        for (; k + 4 * kLanes <= width; k += 4 * kLanes) {
          for (int u = 0; u < 4; ++u) sum[u] += load(row + k + u * kLanes) * load(in + k + u * kLanes);
        }
        for (; k + kLanes <= width; k += kLanes) sum[0] += load(row + k) * load(in + k);
        const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float total = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) total += all[lane];
        for (; k < width; ++k) total += row[k] * in[k];
        finish(i, r, total);
      }
    }
  });
}

// Bilinear-like upsampling [1, 3, 3, 1] of planes [size / 2]^2, added to `images` [n * c, size, size].
void add_upsampled(const float* skip, int64_t planes, int64_t size, float* images) {
  const int64_t half = size / 2;
  parallel(planes * size, 1 + 16384 / size, [=](int64_t begin, int64_t end) {
    Buffer<float> row(half + 2);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t y = job % size, near = y / 2, far = y % 2 ? near + 1 : near - 1;
      const float* plane = skip + job / size * half * half;
      const float* a = plane + near * half;
      const float* b = far >= 0 && far < half ? plane + far * half : nullptr;
      float* mixed = row.data() + 1;
      for (int64_t x = 0; x < half; ++x) mixed[x] = .75f * a[x] + (b ? .25f * b[x] : 0.f);
      mixed[-1] = mixed[half] = 0;
      float* to = images + job * size;
      for (int64_t x = 0; x < half; ++x) {
        to[2 * x] += .75f * mixed[x] + .25f * mixed[x - 1];
        to[2 * x + 1] += .75f * mixed[x] + .25f * mixed[x + 1];
      }
    }
  });
}

// images [n, c, size, size] = x [n, size, size, pitch] . weights [n, c, pitch] + bias [c], in [-clamp, clamp] where
// clamp is not negative
template <int C>
void to_image(const float* x, const float* weights, const float* bias, int64_t n, int64_t pixels, int64_t pitch,
              float clamp, float* images) {
  constexpr int64_t kRun = 4;  // pixels at a time: they share the loads of the weights
  parallel(n * pixels / kRun, 1 + 65536 / (pitch * C * kRun), [=](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t image = job * kRun / pixels, pixel = job * kRun % pixels;
      const float* in = x + (image * pixels + pixel) * pitch;
      const float* w = weights + image * C * pitch;
      V sum[C][kRun] = {};
      for (int64_t c = 0; c < pitch; c += kLanes) {
        V at[kRun];
        for (int64_t p = 0; p < kRun; ++p) at[p] = load(in + p * pitch + c);
        for (int k = 0; k < C; ++k) {
          const V wk = load(w + k * pitch + c);
          for (int64_t p = 0; p < kRun; ++p) sum[k][p] += wk * at[p];
        }
      }
      for (int k = 0; k < C; ++k) {
        for (int64_t p = 0; p < kRun; ++p) {
          float total = 0;
          for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[k][p][lane];
          total += bias[k];
          if (clamp >= 0) {
            total = total > clamp ? clamp : total;
            total = total < -clamp ? -clamp : total;
          }
          images[(image * C + k) * pixels + pixel + p] = total;
        }
      }
    }
  });
}

void to_image(int64_t channels, const float* x, const float* weights, const float* bias, int64_t n, int64_t pixels,
              int64_t pitch, float clamp, float* images) {
  switch (channels) {
    case 1:
      return to_image<1>(x, weights, bias, n, pixels, pitch, clamp, images);
    case 2:
      return to_image<2>(x, weights, bias, n, pixels, pitch, clamp, images);
    case 3:
      return to_image<3>(x, weights, bias, n, pixels, pitch, clamp, images);
    default:
      return to_image<4>(x, weights, bias, n, pixels, pitch, clamp, images);
  }
}

template <class P, int M>
void styled_layer(const SynthesisNetwork& net, int64_t index, const float* x, Workspace& workspace, float* y) {
  const StyledLayer& layer = net.layers[index];
  const int64_t pitch_in = pitch_of(layer.c_in), pitch_out = pitch_of(layer.c_out), n = net.n;
  float* style = workspace.get(Workspace::vectors, 2 * n * pitch_in + (n + 1) * pitch_out);
  float *squared = style + n * pitch_in, *factor = squared + n * pitch_in, *bias = factor + n * pitch_out;
  std::memset(style, 0, (2 * n * pitch_in + (n + 1) * pitch_out) * sizeof(float));
  const float* w = net.w_plus + index * net.style_dim;
  rows_dot(layer.affine, layer.c_in, net.style_dim, w, net.n_latent * net.style_dim, n,
           [&](int64_t i, int64_t r, float dot) {
             const float s = dot + layer.affine_bias[r];
             style[i * pitch_in + r] = s;
             squared[i * pitch_in + r] = s * s;
           });
  rows_dot(layer.squares, layer.c_out, layer.c_in, squared, pitch_in, n,
           [&](int64_t i, int64_t r, float dot) { factor[i * pitch_out + r] = net.gain / std::sqrt(dot + 1e-8f); });
  for (int64_t c = 0; c < layer.c_out; ++c) bias[c] = layer.bias[c] * net.gain;
  const LayerData data{n, x, style, factor, bias, net.slope, net.gain, net.clamp, y};
  if (layer.up) {
    StyledConv<P, M, true>(layer, data, workspace).run();
  } else {
    StyledConv<P, M, false>(layer, data, workspace).run();
  }
}

void image_layer(const SynthesisNetwork& net, int64_t index, int64_t latent, int64_t size, const float* x,
                 const float* skip, Workspace& workspace, float* images) {
  const ImageLayer& layer = net.to_image[index];
  const int64_t pitch = pitch_of(layer.c_in), n = net.n, channels = net.n_channels;
  float* weights = workspace.get(Workspace::vectors, n * channels * pitch);
  std::memset(weights, 0, n * channels * pitch * sizeof(float));
  rows_dot(layer.affine, layer.c_in, net.style_dim, net.w_plus + latent * net.style_dim, net.n_latent * net.style_dim,
           n, [&](int64_t i, int64_t r, float dot) {
             const float s = dot + layer.affine_bias[r];
             for (int64_t k = 0; k < channels; ++k) {
               weights[(i * channels + k) * pitch + r] = s * layer.weight[k * layer.c_in + r];
             }
           });
  to_image(channels, x, weights, layer.bias, n, size * size, pitch, net.clamp, images);
  if (skip != nullptr) add_upsampled(skip, n * channels, size, images);
}

void styled_layer(const SynthesisNetwork& net, int64_t index, const float* x, Workspace& workspace, float* y) {
#ifdef SAGE_BF16
  if (net.layers[index].bf16) return styled_layer<Bf16Products, 2>(net, index, x, workspace, y);
#endif
  styled_layer<Fp32Products, 4>(net, index, x, workspace, y);
}

// Both slots in their full size at once: grown layer by layer they would leave holes behind them.
float* reserve_activations(const SynthesisNetwork& net, Workspace& workspace) {
  int64_t most[2] = {16 * pitch_of(net.layers[0].c_in), 0};
  for (int64_t i = 0; i < net.n_layers; ++i) {
    const StyledLayer& layer = net.layers[i];
    int64_t& slot = most[(i + 1) % 2];
    slot = std::max(slot, layer.size * layer.size * pitch_of(layer.c_out));
  }
  workspace.get(Workspace::activations_b, net.n * most[1]);
  return workspace.get(Workspace::activations_a, net.n * most[0]);
}

void run(const SynthesisNetwork& net, Workspace& workspace) {
  // the learned input, the same for all
  const int64_t c = net.layers[0].c_in, pitch = pitch_of(c);
  float* x = reserve_activations(net, workspace);
  std::memset(x, 0, net.n * 16 * pitch * sizeof(float));
  for (int64_t i = 0; i < net.n; ++i) {
    for (int64_t k = 0; k < c; ++k) {
      for (int64_t p = 0; p < 16; ++p) x[(i * 16 + p) * pitch + k] = net.input[k * 16 + p];
    }
  }
  Workspace::Slot next = Workspace::activations_b, skip_slot = Workspace::image_a;
  const auto advance = [&](int64_t index) {
    const StyledLayer& layer = net.layers[index];
    net.listener->begins(index);
    float* y = workspace.get(next, net.n * layer.size * layer.size * pitch_of(layer.c_out));
    styled_layer(net, index, x, workspace, y);
    x = y;
    next = next == Workspace::activations_a ? Workspace::activations_b : Workspace::activations_a;
    net.listener->ends();
  };
  const float* skip = nullptr;
  for (int64_t i = 0; i < net.n_images; ++i) {
    if (i > 0) advance(2 * i - 1);
    advance(2 * i);
    const int64_t size = net.layers[2 * i].size;
    const bool last = i + 1 == net.n_images;
    float* images = last ? net.images : workspace.get(skip_slot, net.n * net.n_channels * size * size);
    net.listener->begins(net.n_layers + i);
    image_layer(net, i, 2 * i + 1, size, x, skip, workspace, images);
    net.listener->ends();
    skip = images;
    skip_slot = skip_slot == Workspace::image_a ? Workspace::image_b : Workspace::image_a;
  }
}

// weight [c_out, c_in, 3, 3] -> [matrices^2][panels][depth / pair][kPanel][pair], zeros beyond the channels. In double,
// so that a transformed weight is rounded once.
template <class P, class F>
void pack(const float* weight, const PackShape& shape, typename P::type* out) {
  typedef double Doubles __attribute__((vector_size(2 * SAGE_VECTOR_BYTES)));  // as many as V has
  const int64_t depth = pitch_of(shape.c_in) / P::pair, panels = panels_of(shape.c_out);
  const int64_t pitch = packed_pitch<P>(depth * P::pair, panels);
  parallel(depth, 1 + 2048 / shape.c_out, [=](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < panels * kPanel; o += kLanes) {
      for (int64_t step = begin; step < end; ++step) {
        Doubles taps[P::pair][9];
        for (int64_t p = 0; p < P::pair; ++p) {
          const int64_t c = step * P::pair + p, filters = c < shape.c_in ? shape.c_out - o : 0;
          V g[9];
          load_taps(weight + (o * shape.c_in + c) * 9, shape.c_in * 9, g, filters);
          for (int64_t k = 0; k < 9; ++k) taps[p][k] = __builtin_convertvector(g[k], Doubles);
        }
        typename P::type* to = out + ((o / kPanel * depth + step) * kPanel + o % kPanel) * P::pair;
        for (int64_t i = 0; i < F::matrices; ++i) {
          Doubles row[P::pair][3];
          for (int64_t p = 0; p < P::pair; ++p) {
            for (int64_t k = 0; k < 3; ++k) {
              const Doubles* g = taps[p] + k;
              row[p][k] = F::G[i][0] * g[0] + F::G[i][1] * g[3] + F::G[i][2] * g[6];
            }
          }
          for (int64_t j = 0; j < F::matrices; ++j) {
            V u[P::pair];
            for (int64_t p = 0; p < P::pair; ++p) {
              const Doubles sum = F::G[j][0] * row[p][0] + F::G[j][1] * row[p][1] + F::G[j][2] * row[p][2];
              u[p] = __builtin_convertvector(sum, V);
            }
            P::put_weights(u, to + (i * F::matrices + j) * pitch);
          }
        }
      }
    }
  });
}

// numbers in what pack writes
template <class P, int M>
int64_t packed_size(const PackShape& shape) {
  const int64_t matrices = shape.up ? Transform<M, true>::matrices : Transform<M, false>::matrices;
  return matrices * matrices * packed_pitch<P>(pitch_of(shape.c_in), panels_of(shape.c_out));
}

template <class P, int M>
void pack(const float* weight, const PackShape& shape, void* out) {
  auto* to = static_cast<typename P::type*>(out);
  if (shape.up) return pack<P, Transform<M, true>>(weight, shape, to);
  pack<P, Transform<M, false>>(weight, shape, to);
}

}  // namespace

void synthesis(const SynthesisNetwork& net, Workspace& workspace) { run(net, workspace); }
int64_t synthesis_packed_size(const PackShape& shape) {
#ifdef SAGE_BF16
  if (shape.bf16) return packed_size<Bf16Products, 2>(shape);
#endif
  return packed_size<Fp32Products, 4>(shape);
}
void synthesis_pack(const float* weight, const PackShape& shape, void* out) {
#ifdef SAGE_BF16
  if (shape.bf16) return pack<Bf16Products, 2>(weight, shape, out);
#endif
  pack<Fp32Products, 4>(weight, shape, out);
}

}  // namespace sage_fast::SAGE_ISA
