// What the kernels of the Gaussian low-pass are handed: the bands of ../gaussian_low_pass.h in blocks, without std.
#pragma once

#include <cstdint>

namespace sage_fast {

constexpr int64_t kBandRows = 4;  // outputs a block along the rows of an image
// Outputs a block along the columns of an image: two cache lines.
template <class T>
constexpr int64_t kBandCols = 128 / sizeof(T);

// A banded matrix [n_out, n_in], `block` rows at a time (the last is filled up with zeros). Block b weighs the inputs
// index[begin[b]] to index[begin[b + 1]], which ascend.
template <class T>
struct BandBlocks {
  int64_t n_in = 0, n_out = 0, blocks = 0;
  const int64_t* begin = nullptr;  // [blocks + 1]
  const int64_t* index = nullptr;  // [begin[blocks]]
  const T* weights = nullptr;      // [begin[blocks], block]
};

// Images [h, w]: rows_down, cols_down, cols_up, rows_up in this order; a `down` without outputs is left out.
template <class T>
struct LowPass {
  int64_t h, w;
  BandBlocks<T> rows_down, cols_down, cols_up, rows_up;
};

}  // namespace sage_fast
