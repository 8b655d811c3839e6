// A styled layer as one product of matrices: which rows of it are which pixels, for the CUDA kernel and its tests.
//
// The rows of a block's product are kRows pixels: a rectangle of one sample or, of small images, rectangles of several.
// Its patch is these pixels and all their neighbours, the rows that lie in shared memory, rectangle after rectangle.
#pragma once

#include "synthesis_epilogue.h"

namespace sage_fast {

// Which pixel of which rectangle.
struct Place {
  int rectangle, y, x;
};

struct PixelTiles {
  static constexpr int kRows = 128, kMostPatchRows = 8 * 6 * 6;
  int n, h, w;           // of the convolution's input
  int log_w, log_h;      // of a rectangle: 16 x 8, 8 x 8 or 4 x 4 pixels
  int across, down;      // rectangles of an image
  int patch_w, patch_h;  // with the neighbours

  PixelTiles() = default;
  SAGE_FAST_HD PixelTiles(int64_t samples, int64_t height, int64_t width)
      : n(int(samples)), h(int(height)), w(int(width)) {
    log_w = w > 4 ? 3 + (w > 8) : 2, log_h = w > 4 ? 3 : 2;
    across = (w + (1 << log_w) - 1) >> log_w, down = (h + (1 << log_h) - 1) >> log_h;
    patch_w = (1 << log_w) + 2, patch_h = (1 << log_h) + 2;
  }
  SAGE_FAST_HD int log_pixels() const { return log_w + log_h; }
  SAGE_FAST_HD int samples() const { return kRows >> log_pixels(); }  // of a tile
  SAGE_FAST_HD int64_t count() const { return int64_t{(n + samples() - 1) / samples()} * across * down; }
  SAGE_FAST_HD int patch_rows() const { return samples() * patch_h * patch_w; }

  // A row of the product. Eight rows from a multiple of 8 lie in eight rows of the patch that differ modulo 8, as
  // swizzled() wants it: for 4 x 4 pixels two rectangles take turns, whose patches are 36 rows apart. Rows r and r + 8
  // are of one sample.
  SAGE_FAST_HD Place place(int row) const {
    if (log_w == 2) return {row >> 5 << 1 | (row >> 2 & 1), row >> 3 & 3, row & 3};
    return {row >> log_pixels(), row >> log_w & ((1 << log_h) - 1), row & ((1 << log_w) - 1)};
  }

  // The patch's row of the upper left neighbour of a pixel; dy rows down and dx columns on lie dy * patch_w + dx on.
  SAGE_FAST_HD int patch_row(int row) const {
    const Place at = place(row);
    return (at.rectangle * patch_h + at.y) * patch_w + at.x;
  }
};

// A pixel of the convolution's input; inside: it is one.
struct Pixel {
  int sample, y, x;
  bool inside;

  SAGE_FAST_HD int index(const PixelTiles& t) const { return (sample * t.h + y) * t.w + x; }
};

// Where a tile lies: its first sample and the corner of its rectangles.
struct Tile {
  int sample, y, x;

  SAGE_FAST_HD Tile(const PixelTiles& t, int64_t tile)
      : sample(int(tile / (t.across * t.down)) * t.samples()),
        y((int(tile / t.across) % t.down) << t.log_h),
        x(int(tile % t.across) << t.log_w) {}

  SAGE_FAST_HD Pixel pixel(const PixelTiles& t, int rectangle, int dy, int dx) const {
    Pixel p{sample + rectangle, y + dy, x + dx, false};
    p.inside = p.sample < t.n && p.y >= 0 && p.y < t.h && p.x >= 0 && p.x < t.w;
    return p;
  }
  SAGE_FAST_HD Pixel of_row(const PixelTiles& t, int row) const {
    const Place at = t.place(row);
    return pixel(t, at.rectangle, at.y, at.x);
  }
  SAGE_FAST_HD Pixel of_patch(const PixelTiles& t, int row) const {
    const int area = t.patch_h * t.patch_w, within = row % area;
    return pixel(t, row / area, within / t.patch_w - 1, within % t.patch_w - 1);
  }
};

// Where 16 bytes of a row of 64 lie: moved so that the same 16 of eight rows in a row lie in different banks.
SAGE_FAST_HD int swizzled(int row, int part) { return row * 64 + ((part ^ (row >> 1)) & 3) * 16; }

// A layer of n samples. Up: 2 x 2 phases, each a convolution at the input's size with weights of its own, that gives
// every second pixel of every second row.
template <class T>
struct StyledConvArgs {
  EpilogueArgs<T> out;  // x: [n, h, w, c_in] of the input, times its style
  ImageArgs to;         // channels 0: no image is wanted
  PixelTiles tiles;     // over the input
  const T* weight;      // [phases, c, 9, c_in], taps row by row
  int c_in, phases;
  int channel_tiles;   // of the kernel's width, that cover c
  int splits;          // blocks that share the input channels of one product; small images leave too few otherwise
  float* split_sums;   // [splits, blocks, 128, width] as the threads hold them, or null with one split // output
  float* image_parts;  // [channel_tiles, n, channels, h, w] each tile's share of the image, or null with one // output
};

}  // namespace sage_fast
