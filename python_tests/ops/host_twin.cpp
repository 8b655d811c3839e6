// What CUDA kernels take from headers that any compiler takes, for tests that look at it by itself.
#include "counter_normal.h"
#include "styled_conv.h"

using namespace sage_fast;

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
