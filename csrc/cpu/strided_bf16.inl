// 3 x 3 convolutions of stride 2 of bfloat16 images by bfloat16 products, their transposes, and the gradient of their
// weights: the direct algorithm, since products of two numbers a lane leave a transform nothing to save.
//
//   y from x:  a pixel of y is a row of 9 pixels of x times the weights
//   x from y:  four pixels of x, even or odd in row and column, are a row of 1, 2, 2 and 4 of the same 4 pixels of y
//   w:         for each tap, the pixels of x under it, transposed, times y; two neighbours of a row make a pair
// Sums are float32.

#include "../conv3x3.h"
#include "bands.inl"
#include "gemm.inl"
#include "taps.inl"
#include "workspace.h"

namespace sage_fast::SAGE_ISA {
namespace {

// Taps whose products are one: pixels [first, first + count) of a gathered row, tap[k] for the k-th of them.
struct TapRun {
  int64_t first, count, tap[9];
  int64_t row, column;  // of the pixel that it makes, beside the cell's first
};

constexpr TapRun kAllTaps{0, 9, {0, 1, 2, 3, 4, 5, 6, 7, 8}, 0, 0};
// of the pixels (i, j - 1), (i, j), (i - 1, j), (i - 1, j - 1) of y: what makes (2 i + row, 2 j + column) of x
constexpr TapRun kPhases[4] = {
    {0, 4, {2, 0, 6, 8}, 0, 0}, {1, 2, {1, 7}, 0, 1}, {0, 2, {5, 3}, 1, 0}, {1, 1, {4}, 1, 1}};

// Weights of each run times the scale, two neighbouring depths a word -> [panels][count, depth / 2][kPanel], one run
// after another
void pack_runs(const float* weight, int64_t column_stride, int64_t columns, int64_t depth_stride, int64_t depth,
               float scale, const TapRun* runs, int64_t n_runs, uint32_t* packed) {
  const auto pack = [=](int64_t o, int64_t pair) {
    V g[2][9];
    for (int64_t i = 0; i < 2; ++i) {
      load_taps(weight + o * column_stride + (2 * pair + i) * depth_stride, column_stride, g[i]);
    }
    uint32_t* run = packed + o % kPanel;
    for (int64_t r = 0; r < n_runs; ++r) {
      for (int64_t k = 0; k < runs[r].count; ++k) {
        const int64_t row = (o / kPanel * runs[r].count + k) * (depth / 2) + pair, tap = runs[r].tap[k];
        const Words words = side_by_side(narrow(scale * g[0][tap], BFloat16()), narrow(scale * g[1][tap], BFloat16()));
        store<uint32_t>(words, run + row * kPanel);
      }
      run += runs[r].count * depth * columns / 2;
    }
  };
  // in the order of memory: a filter is 36 bytes, and what is read is most of the time for large weights
  parallel(depth / 2, 1 + 4096 / columns, [=](int64_t begin, int64_t end) {
    if (depth_stride < column_stride) {
      for (int64_t o = 0; o < columns; o += kLanes) {
        for (int64_t pair = begin; pair < end; ++pair) pack(o, pair);
      }
    } else {
      for (int64_t pair = begin; pair < end; ++pair) {
        for (int64_t o = 0; o < columns; o += kLanes) pack(o, pair);
      }
    }
  });
}

// Rows of gathered pixels, `pitch` apart; out[r] is where what row r makes belongs, null: nowhere.
struct Gathered {
  uint16_t* rows;
  int64_t pitch;
  uint16_t** out;

  Gathered(int64_t most, int64_t depth, int64_t outs) : pitch(depth + 32) {
    Workspace& own = thread_workspace();
    rows = reinterpret_cast<uint16_t*>(own.get(Workspace::transformed, most * pitch / 2));
    out = reinterpret_cast<uint16_t**>(own.get(Workspace::vectors, most * outs * 2));
  }
  // How many rows stay in the second-level cache while the panels of weights pass by.
  static int64_t most(int64_t depth) { return std::max<int64_t>(kMaxRows, (256 << 10) / (2 * (depth + 32))); }
};

// out[r] [kPanel] from `column` on = row r of `count` rows times a panel
template <int Rows>
inline void rows_times_panel(int64_t count, const uint16_t* rows, int64_t pitch, const uint16_t* panel, int64_t depth,
                             uint16_t* const* out, int64_t column) {
  if (count < Rows) {
    if constexpr (Rows > 1) rows_times_panel<Rows - 1>(count, rows, pitch, panel, depth, out, column);
    return;
  }
  __m512 sum[Rows][2];
  sum_pairs<Rows>(rows, pitch, panel, depth, sum);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(sum[r][1], sum[r][0]);
    if (out[r] != nullptr) _mm512_storeu_si512(out[r] + column, both);
  }
}

// All columns of one run, for the gathered rows [first, last).
void multiply_run(const Gathered& from, int64_t first, int64_t last, const TapRun& run, const uint32_t* packed,
                  int64_t depth, int64_t columns, uint16_t* const* out) {
  const int64_t count = last - first, blocks = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t c = 0; c < columns; c += kPanel) {
    const uint16_t* panel = reinterpret_cast<const uint16_t*>(packed) + c * run.count * depth;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = first + b * count / blocks, n = first + (b + 1) * count / blocks - at;
      const uint16_t* rows = from.rows + at * from.pitch + run.first * depth;
      rows_times_panel<kMaxRows>(n, rows, from.pitch, panel, run.count * depth, out + at, c);
    }
  }
}

inline void copy(const uint16_t* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
}

void y_from_x(const uint16_t* x, const uint32_t* packed, const Conv3x3Params& p, uint16_t* y) {
  const int64_t depth = p.x_channels, columns = p.y_channels, side = p.x_size(), most = Gathered::most(9 * depth);
  parallel(p.n * p.size * p.size, kMaxRows + 400000 / (9 * depth * columns), [&](int64_t begin, int64_t end) {
    const Gathered pixels(most, 9 * depth, 1);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t count = std::min(most, end - first);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t pixel = first + r, image = pixel / (p.size * p.size), i = pixel / p.size % p.size;
        const uint16_t* from = x + ((image * side + 2 * i) * side + 2 * (pixel % p.size)) * depth;
        for (int64_t k = 0; k < 3; ++k) {  // three pixels side by side
          copy(from + k * side * depth, 3 * depth, pixels.rows + r * pixels.pitch + k * 3 * depth);
        }
        pixels.out[r] = y + pixel * columns;
      }
      multiply_run(pixels, 0, count, kAllTaps, packed, depth, columns, pixels.out);
    }
  });
}

// Cells (i, j) of 2 x 2 pixels of x, of some rows of cells: first those right of y, then those within it, then those
// below it, so that the cells that have a pixel of one kind follow one another.
void x_from_y(const uint16_t* y, const uint32_t* packed, const Conv3x3Params& p, uint16_t* x) {
  const int64_t depth = p.y_channels, columns = p.x_channels, s = p.size, side = p.x_size();
  const int64_t most = std::max<int64_t>(1, Gathered::most(4 * depth) / (s + 1));  // rows of cells at a time
  const int64_t most_cells = (most + most / s + 1) * (s + 1);
  parallel(p.n * s, 1 + 400000 / (9 * depth * columns * s), [&](int64_t begin, int64_t end) {
    const Gathered cells(most_cells, 4 * depth, 4);
    int64_t count = 0;
    const auto add = [&](int64_t image, int64_t i, int64_t j) {
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t row = i - (k > 1), column = j - (k == 0 || k == 3);
        const bool hit = row >= 0 && row < s && column >= 0 && column < s;
        uint16_t* to = cells.rows + count * cells.pitch + k * depth;
        if (hit) copy(y + ((image * s + row) * s + column) * depth, depth, to);
        if (!hit) std::memset(to, 0, depth * sizeof(uint16_t));
        const int64_t x_row = 2 * i + kPhases[k].row, x_column = 2 * j + kPhases[k].column;
        const bool has = x_row < side && x_column < side;
        cells.out[k * most_cells + count] = has ? x + ((image * side + x_row) * side + x_column) * columns : nullptr;
      }
      ++count;
    };
    for (int64_t first = begin; first < end; first += most) {
      const int64_t last = std::min(first + most, end);
      count = 0;
      for (int64_t row = first; row < last; ++row) add(row / s, row % s, s);
      const int64_t right = count;
      for (int64_t row = first; row < last; ++row) {
        for (int64_t j = 0; j < s; ++j) add(row / s, row % s, j);
      }
      const int64_t within = count;
      for (int64_t image = first / s; (image + 1) * s <= last; ++image) {
        for (int64_t j = 0; j <= s; ++j) add(image, s, j);
      }
      const uint32_t* run = packed;
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t from = kPhases[k].column ? right : 0, to = kPhases[k].row ? within : count;
        multiply_run(cells, from, to, kPhases[k], run, depth, columns, cells.out + k * most_cells);
        run += kPhases[k].count * depth * columns / 2;
      }
    }
  });
}

// Channels of two pixels -> words of one number of each
inline void interleave(const uint16_t* a, const uint16_t* b, int64_t channels, uint32_t* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Halves low, high;
    std::memcpy(&low, a + c, sizeof(low));
    std::memcpy(&high, b + c, sizeof(high));
    store<uint32_t>(side_by_side(low, high), to + c);
  }
}

// A sum over pairs of pixels: `runs` times `count` of them, a row of words a pair.
struct Pairs {
  int64_t runs, count, a_pitch, a_run, b_run;
};

// c [Rows, kPanel] (pitch ldc) += a [pairs, Rows], transposed, x b [pairs, kPanel]
template <int Rows>
inline void outer_pairs(const uint32_t* a, const uint32_t* b, const Pairs& pairs, float* c, int64_t ldc) {
  __m512 sum[Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    sum[r][0] = _mm512_loadu_ps(c + r * ldc);
    sum[r][1] = _mm512_loadu_ps(c + r * ldc + kLanes);
  }
  for (int64_t run = 0; run < pairs.runs; ++run) {
    const uint32_t *from_a = a + run * pairs.a_run, *from_b = b + run * pairs.b_run;
    for (int64_t k = 0; k < pairs.count; ++k) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(from_b), b1 = (__m512bh)_mm512_loadu_si512(from_b + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const __m512bh two = (__m512bh)_mm512_set1_epi32(int32_t(from_a[r]));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], two, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], two, b1);
      }
      from_a += pairs.a_pitch;
      from_b += kPanel;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(c + r * ldc, sum[r][0]);
    _mm512_storeu_ps(c + r * ldc + kLanes, sum[r][1]);
  }
}

template <int Rows>
inline void outer_pairs(int64_t rows, const uint32_t* a, const uint32_t* b, const Pairs& pairs, float* c, int64_t ldc) {
  if (rows == Rows) return outer_pairs<Rows>(a, b, pairs, c, ldc);
  if constexpr (Rows > 1) outer_pairs<Rows - 1>(rows, a, b, pairs, c, ldc);
}

// du [9][x_channels, y_channels]: of the tasks [begin, end), each one row of taps and one panel of columns. All images
// pass by in bands that stay in the second-level cache; the sums do not depend on who takes which tasks.
class TapSums {
 public:
  TapSums(const Conv3x3Params& p, const uint16_t* x, const uint16_t* y)
      : p_(p), x_(x), y_(y), panels_(p.y_channels / kPanel), half_(p.size / 2) {
    // words that a row of y and the two rows of x under it take; bands of few rows would read and write du too often
    const int64_t row = half_ * (6 * p.x_channels + p.y_channels), du = 9 * p.x_channels * p.y_channels;
    const int64_t most = std::max<int64_t>(4, std::max<int64_t>(400 << 8, du / 4) / row);
    rows_ = std::min(p.size, most);
    images_ = std::min(p.n, std::max<int64_t>(1, most / p.size));
    x_image_ = (2 * rows_ + 1) * half_ * p.x_channels;
    y_image_ = rows_ * half_ * kPanel;
  }

  int64_t tasks() const { return 3 * panels_; }

  void add(int64_t begin, int64_t end, float* du) const {
    Workspace& own = thread_workspace();
    uint32_t* a = reinterpret_cast<uint32_t*>(own.get(Workspace::transformed, 3 * images_ * x_image_));
    uint32_t* b = reinterpret_cast<uint32_t*>(own.get(Workspace::products, panels_ * images_ * y_image_));
    for (int64_t image = 0; image < p_.n; image += images_) {
      for (int64_t row = 0; row < p_.size; row += rows_) {
        const Band band{image, std::min(images_, p_.n - image), row, std::min(rows_, p_.size - row), half_};
        pack_x(band, begin, end, a);
        pack_y(band, b);
        multiply_band(band, begin, end, a, b, du);
      }
    }
  }

 private:
  void multiply_band(const Band& band, int64_t begin, int64_t end, const uint32_t* a, const uint32_t* b,
                     float* du) const {
    const int64_t depth = p_.x_channels, width = p_.y_channels, blocks = (depth + kMaxRows - 1) / kMaxRows;
    const Pairs pairs{band.images, band.rows * half_, depth, x_image_, y_image_};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / panels_, panel = task % panels_;
      // even rows of x before the odd ones; the row of taps below begins one even row further
      const int64_t first = row == 1 ? (rows_ + 1) * half_ : row / 2 * half_;
      for (int64_t column = 0; column < 3; ++column) {
        const uint32_t* from = a + column * images_ * x_image_ + first * depth;
        float* to = du + (row * 3 + column) * depth * width + panel * kPanel;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t c = block * depth / blocks, rows = (block + 1) * depth / blocks - c;
          outer_pairs<kMaxRows>(rows, from + c, b + panel * images_ * y_image_, pairs, to + c * width, width);
        }
      }
    }
  }

  // [3 columns of taps][image][even rows, then odd][pairs][x_channels]
  void pack_x(const Band& band, int64_t begin, int64_t end, uint32_t* a) const {
    const int64_t side = p_.x_size(), depth = p_.x_channels, first = begin / panels_, last = (end - 1) / panels_;
    for (int64_t column = 0; column < 3; ++column) {
      for (int64_t image = 0; image < band.images; ++image) {
        for (int64_t i = 0; i <= 2 * band.rows; ++i) {
          if (i % 2 == 0 ? first == 1 && last == 1 : first > 1 || last < 1) continue;  // no task reads it
          const int64_t row = (band.first_image + image) * side + 2 * band.first_row + i;
          const uint16_t* from = x_ + (row * side + column) * depth;
          uint32_t* to = a + (column * images_ + image) * x_image_ + (i / 2 + i % 2 * (rows_ + 1)) * half_ * depth;
          for (int64_t j = 0; j < half_; ++j) {
            interleave(from + 4 * j * depth, from + (4 * j + 2) * depth, depth, to + j * depth);
          }
        }
      }
    }
  }

  // [panels][image][pairs][kPanel]
  void pack_y(const Band& band, uint32_t* b) const {
    const int64_t channels = p_.y_channels;
    for (int64_t image = 0; image < band.images; ++image) {
      const int64_t row = (band.first_image + image) * p_.size + band.first_row;
      const uint16_t* from = y_ + row * p_.size * channels;
      for (int64_t i = 0; i < band.rows * half_; ++i, from += 2 * channels) {
        for (int64_t panel = 0; panel < panels_; ++panel) {
          uint32_t* to = b + (panel * images_ + image) * y_image_ + i * kPanel;
          interleave(from + panel * kPanel, from + channels + panel * kPanel, kPanel, to);
        }
      }
    }
  }

  const Conv3x3Params& p_;
  const uint16_t *x_, *y_;
  const int64_t panels_, half_;  // columns of y are pairs
  int64_t images_, rows_;        // of a band: several images, or some rows of one
  int64_t x_image_, y_image_;    // words of an image in a band: of one column of taps, of one panel
};

uint32_t* packed_weights(int64_t depth, int64_t columns, Workspace& workspace) {
  return reinterpret_cast<uint32_t*>(workspace.get(Workspace::packed, 9 * depth * columns / 2));
}

void strided_conv3x3(const void* x, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* y) {
  uint32_t* packed = packed_weights(p.x_channels, p.y_channels, workspace);
  pack_runs(weight, p.weight_stride_y, p.y_channels, p.weight_stride_x, p.x_channels, p.scale, &kAllTaps, 1, packed);
  y_from_x((const uint16_t*)x, packed, p, (uint16_t*)y);
}

void strided_conv3x3_transposed(const void* y, const float* weight, const Conv3x3Params& p, Workspace& workspace,
                                void* x) {
  uint32_t* packed = packed_weights(p.y_channels, p.x_channels, workspace);
  pack_runs(weight, p.weight_stride_x, p.x_channels, p.weight_stride_y, p.y_channels, p.scale, kPhases, 4, packed);
  x_from_y((const uint16_t*)y, packed, p, (uint16_t*)x);
}

void strided_conv3x3_taps(const void* x, const void* y, const Conv3x3Params& p, Workspace& workspace, float* weight) {
  const TapSums sums(p, (const uint16_t*)x, (const uint16_t*)y);
  const int64_t depth = p.x_channels, columns = p.y_channels;
  float* du = workspace.get(Workspace::packed, 9 * depth * columns);
  std::memset(du, 0, 9 * depth * columns * sizeof(float));
  const int64_t work = p.n * p.size * p.size * 3 * depth * kPanel;
  parallel(sums.tasks(), 1 + 400000 / (work + 1), [&](int64_t begin, int64_t end) { sums.add(begin, end, du); });
  parallel(depth, 1 + 4096 / columns, [=, &p](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < columns; o += kLanes) {
      for (int64_t c = begin; c < end; ++c) {
        V g[9];
        for (int64_t k = 0; k < 9; ++k) g[k] = p.scale * load(du + (k * depth + c) * columns + o);
        store_taps(g, weight + (o * depth + c) * 9, depth * 9);
      }
    }
  });
}

}  // namespace
}  // namespace sage_fast::SAGE_ISA
