// The tiles of a batch of images, cut into bands whose intermediate results stay in the cache.

#pragma once

namespace sage_fast::SAGE_ISA {

// Whole tile rows of whole images, or some tile rows of one image.
struct Band {
  int64_t first_image, images, first_row, rows, columns;
  int64_t tile_rows() const { return images * rows; }
  int64_t tiles() const { return images * rows * columns; }
};

class Bands {
 public:
  // n images of across x across tiles; `tile_bytes`: what the transform's domain keeps of a tile, `weight_bytes` of
  // weights
  Bands(int64_t n, int64_t across, int64_t tile_bytes, int64_t weight_bytes)
      : n_(n), across_(across), weights_fit_(weight_bytes <= (12 << 20)) {
    // In the second-level cache, but not so few tiles that the weights, which every band reads anew, would have to come
    // from memory faster than it gives them. Measured at 32 to 256 px on one and two threads.
    const int64_t budget = std::max<int64_t>(800 << 10, weights_fit_ ? 0 : weight_bytes / 4);
    const int64_t most = std::min(n * across * across, std::max<int64_t>(budget / tile_bytes, 24));
    images_ = std::min(n, std::max<int64_t>(1, most / (across * across)));
    rows_ = images_ > 1 ? across : std::min(across, std::max<int64_t>(1, most / across));
  }

  int64_t most_rows() const { return images_ * rows_; }  // tile rows of the largest band

  // Many tiles, and weights that fit the cache: each thread takes tile rows of its own, with no barrier between the
  // steps. Otherwise all threads share the tiles of a band, and each reads its part of the weights once.
  bool for_each_thread() const { return weights_fit_ && n_ * across_ >= 8 && n_ * across_ * across_ >= 48; }

  // body(band) over the tile rows `begin` to `end` of all images: whole images where several fit, else rows of one.
  template <class Body>
  void for_each(int64_t begin, int64_t end, Body&& body) const {
    for (int64_t at = begin; at < end;) {
      const int64_t image = at / across_, row = at % across_, whole = std::min(images_, (end - at) / across_);
      const bool several = row == 0 && images_ > 1 && whole > 0;
      const int64_t rows = several ? across_ : std::min({rows_, across_ - row, end - at});
      const Band band{image, several ? whole : 1, several ? 0 : row, rows, across_};
      body(band);
      at += band.tile_rows();
    }
  }

 private:
  int64_t n_, across_, images_, rows_;
  bool weights_fit_;
};

// One end of a convolution: images [n, size, size, channels] seen by tiles `step` apart that begin `edge` outside.
struct End {
  int64_t size, channels, step, edge;
};

// The pixels of one tile's window, zeros where it leaves the image; up to 4096 channels.
template <int Places, class T>
struct Window {
  const T* at[Places][Places];

  void move_to(const Band& band, const End& end, const T* images, int64_t tile) {
    alignas(64) static const T zeros[4096] = {};
    const int64_t job = tile / band.columns, image = band.first_image + job / band.rows;
    const int64_t top = (band.first_row + job % band.rows) * end.step - end.edge;
    const int64_t left = tile % band.columns * end.step - end.edge, most = end.size - Places;
    const T* first = images + ((image * end.size + top) * end.size + left) * end.channels;
    const bool inside = top >= 0 && left >= 0 && top <= most && left <= most;
    for (int64_t i = 0; i < Places; ++i) {
      for (int64_t j = 0; j < Places; ++j) at[i][j] = first + (i * end.size + j) * end.channels;
    }
    if (inside) return;
    for (int64_t i = 0; i < Places; ++i) {
      for (int64_t j = 0; j < Places; ++j) {
        const bool hit = top + i >= 0 && top + i < end.size && left + j >= 0 && left + j < end.size;
        if (!hit) at[i][j] = zeros;
      }
    }
  }
};

}  // namespace sage_fast::SAGE_ISA
