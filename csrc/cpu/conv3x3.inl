// The plain styled layer's convolution without style and epilogue, and the gradient of its weights, in float32.

#include "../conv3x3.h"
#include "styled_conv.inl"
#include "workspace.h"

namespace sage_fast::SAGE_ISA {
namespace {

using Plain = Transform<4, false>;
constexpr int64_t kPlainPoints = Plain::points * Plain::points;

// taps [3, 3, c_in, c_out] -> [points^2][panels][c_in, kPanel]: G taps G^T, a vector of output channels at a time
void pack_taps(const float* taps, const Conv3x3Params& p, float* out) {
  const int64_t panels = panels_of(p.c_out), step = p.c_in * p.c_out;
  parallel(p.c_in, 1 + 8192 / p.c_out, [=](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t o = 0; o < panels * kPanel; o += kLanes) {
        float* to = out + o / kPanel * p.c_in * kPanel + c * kPanel + o % kPanel;
        V g[9] = {};
        for (int64_t k = 0; o < p.c_out && k < 9; ++k) g[k] = load(taps + k * step + c * p.c_out + o);
        for (int64_t i = 0; i < Plain::points; ++i) {
          V row[3];
          for (int64_t k = 0; k < 3; ++k) {
            row[k] = float(Plain::G[i][0]) * g[k] + float(Plain::G[i][1]) * g[3 + k] + float(Plain::G[i][2]) * g[6 + k];
          }
          for (int64_t j = 0; j < Plain::points; ++j) {
            const V u =
                float(Plain::G[j][0]) * row[0] + float(Plain::G[j][1]) * row[1] + float(Plain::G[j][2]) * row[2];
            store<float>(u, to + (i * Plain::points + j) * panels * p.c_in * kPanel);
          }
        }
      }
    }
  });
}

// du [points^2][c_in, panels * kPanel] -> G^T du G [3, 3, c_in, c_out]
void unpack_gradient(const float* du, const Conv3x3Params& p, float* taps) {
  const int64_t width = panels_of(p.c_out) * kPanel, step = p.c_in * p.c_out;
  parallel(p.c_in, 1 + 8192 / p.c_out, [=](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t o = 0; o < p.c_out; o += kLanes) {
        V g[9] = {};
        for (int64_t i = 0; i < Plain::points; ++i) {
          V row[3] = {};
          for (int64_t j = 0; j < Plain::points; ++j) {
            const V u = load(du + ((i * Plain::points + j) * p.c_in + c) * width + o);
            for (int64_t k = 0; k < 3; ++k) row[k] += float(Plain::G[j][k]) * u;
          }
          for (int64_t k = 0; k < 9; ++k) g[k] += float(Plain::G[i][k / 3]) * row[k % 3];
        }
        for (int64_t k = 0; k < 9; ++k) store<float>(g[k], taps + k * step + c * p.c_out + o);
      }
    }
  });
}

// Style and factor of ones, no bias: the layer is the convolution alone.
struct Neutral {
  Buffer<float> ones, zeros;
  StyledLayer layer;
  LayerData data;

  Neutral(const float* x, const float* packed, const Conv3x3Params& p, float* y)
      : ones(p.n * std::max(p.c_in, p.c_out), 1.f), zeros(p.c_out), layer{}, data{} {
    layer.c_in = p.c_in;
    layer.c_out = p.c_out;
    layer.size = p.size;
    layer.packed = packed;
    data = {p.n, x, ones.data(), ones.data(), zeros.data(), 1.f, 1.f, -1.f, y};
  }
};

}  // namespace

void conv3x3(const float* x, const float* taps, const Conv3x3Params& p, Workspace& workspace, float* y) {
  float* packed = workspace.get(Workspace::packed, kPlainPoints * panels_of(p.c_out) * kPanel * p.c_in);
  pack_taps(taps, p, packed);
  const Neutral neutral(x, packed, p, y);
  StyledConv<Fp32Products, 4, false>(neutral.layer, neutral.data, workspace).run();
}

void conv3x3_taps(const float* x, const float* dy, const Conv3x3Params& p, Workspace& workspace, float* taps) {
  float* du = workspace.get(Workspace::packed, kPlainPoints * panels_of(p.c_out) * kPanel * p.c_in);
  const Neutral neutral(x, nullptr, p, nullptr);
  StyledConv<Fp32Products, 4, false>(neutral.layer, neutral.data, workspace).weight_gradient(dy, du);
  unpack_gradient(du, p, taps);
}

}  // namespace sage_fast::SAGE_ISA
