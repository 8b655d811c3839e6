// The thread functions of the CUDA kernels, called in loops in place of a grid; for tests on machines without a GPU.
#include <cmath>
#include <vector>

#include "counter_normal.h"
#include "styled_conv.h"
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

// The blocks, rounds and threads of csrc/cuda/synthesis.cu one after the other; a warp's sums are added where they
// meet.
extern "C" void twin_styled(const int64_t* sizes, const float* numbers, const float* x, const float* factor,
                            const float* bias, const float* noise, const float* next, int64_t channels,
                            const float* weight, const float* image_bias, const float* skip, float* y, float* image) {
  const auto a = arguments(sizes, numbers, x, factor, bias, noise, next, y);
  const ImageArgs to{channels, weight, image_bias, skip, image};
  const PixelGroups groups((a.c + V - 1) / V);
  const int64_t pixels = a.h * a.w, blocks = groups.blocks(a.n, pixels), tile = groups.tile();
  for (int64_t job = 0; job < a.n * blocks; ++job) {
    const int64_t sample = job / blocks;
    for (int64_t first = job % blocks * tile; first < pixels; first += blocks * tile) {
      std::vector<float> parts(PixelGroups::kPixels * PixelGroups::kThreads * channels);
      for (int thread = 0; thread < PixelGroups::kThreads; ++thread) {
        const int64_t channel = groups.lane(thread) * V;
        if (channel >= a.c) continue;
        const ChannelNumbers<V> mine(a, sample, channel);
        for (int u = 0; u < PixelGroups::kPixels; ++u) {
          const int at = groups.at(thread, u);
          const int64_t pixel = first + at;
          if (pixel >= pixels) continue;
          float v[V], w[V];
          Memory{}.load(a.x + (sample * pixels + pixel) * a.c + channel, v);
          activate(a, mine, noise_at(a, sample, pixel), v);
          for (int64_t k = 0; k < channels; ++k) {
            read(weight + (sample * channels + k) * a.pitch + channel, w);
            parts.at(groups.part(at, groups.lane(thread) / 32) * channels + k) += dot(w, v);
          }
          if (!a.next) continue;
          for (int i = 0; i < V; ++i) v[i] *= mine.next[i];
          Memory{}.store(a.y + (sample * pixels + pixel) * a.c + channel, v);
        }
      }
      for (int64_t i = 0; i < tile * channels; ++i) {
        const int64_t k = i / tile, at = i % tile;
        if (first + at >= pixels) continue;
        float sum = 0;
        for (int w = 0; w < groups.warps(); ++w) sum += parts[groups.part(int(at), w) * channels + k];
        finish_image(to, sample, k, first + at, a.h, a.w, a.most, sum);
      }
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

// The most rows of a matrix that ldmatrix finds in the same 16 bytes of the banks, over all a block of styled_conv
// reads of its patch.
extern "C" int twin_conflicts(int64_t h, int64_t w) {
  const PixelTiles tiles(8, h, w);
  int most = 0;
  for (int first = 0; first < PixelTiles::kRows; first += 8) {
    for (int job = 0; job < 9 * 4; ++job) {
      const int shift = job / 4 / 3 * tiles.patch_w + job / 4 % 3;
      int hits[8] = {};
      for (int row = first; row < first + 8; ++row) {
        const int at = swizzled(tiles.patch_row(row) + shift, job % 4) / 16 % 8;
        if (++hits[at] > most) most = hits[at];
      }
    }
  }
  return most;
}
