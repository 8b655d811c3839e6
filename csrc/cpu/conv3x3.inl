// 3 x 3 convolutions of stride 1 and 2 in the transform's domain, their transposes, and the gradient of their weights.
//
// In one dimension y = C (G w . A x), with A from a window of x to the points, C from the points to 4 places of y:
//   y from x:  A, product with G w, C
//   x from y:  C^T, product with (G w)^T, A^T, which overlap by one place and add up; at stride 1 the convolution with
//              turned weights does the same with no overlap
//   w:         G^T (A x)^T (C^T y), summed over tiles
// Images are float32, at stride 1 also bfloat16, channels last; everything between is float32.

#include "../conv3x3.h"
#include "bands.inl"
#include "gemm.inl"
#include "taps.inl"
#include "workspace.h"

namespace sage_fast::SAGE_ISA {
namespace {

struct Stride1 {
  using F = Transform<4, false>;
  static constexpr int64_t window = 6, step = 4, edge = 1;
  static inline void A(const V* x, V* v) { F::forward(x, v); }
  static inline void C(const V* m, V* y) { F::inverse(m, y); }
  static inline void C_t(const V* y, V* m) { F::transposed_inverse(y, m); }
};

struct Stride2 {
  using F = Transform<4, true>;
  static constexpr int64_t window = 9, step = 8, edge = 0;
  static inline void A(const V* x, V* v) { F::transposed_inverse(x, v); }
  static inline void A_t(const V* m, V* x) { F::inverse(m, x); }
  static inline void C(const V* m, V* y) { F::transposed_forward(m, y); }
  static inline void C_t(const V* y, V* m) { F::forward(y, m); }
};

using Map = void (*)(const V*, V*);  // as a template's argument, so that it is inlined

// Some of the rows of points, those in [first, last).
struct PointRows {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// Tiles of one end to some of the points: images -> v [rows of points, points][tiles, width], zeros beyond the channels
// and the image.
// Pixels of the next tile are fetched meanwhile: a window has too many streams for the processor to foresee.
template <class F, int Places, Map map, class T>
void to_points(const Band& band, const End& end, const T* images, int64_t width, const PointRows& rows, float* v,
               int64_t pitch) {
  parallel(band.tile_rows(), 1 + 65536 / (band.columns * width * F::points), [&](int64_t from, int64_t to) {
    const int64_t last = to * band.columns;
    Window<Places, T> windows[2];
    windows[from * band.columns % 2].move_to(band, end, images, from * band.columns);
    for (int64_t tile = from * band.columns; tile < last; ++tile) {
      const Window<Places, T>& window = windows[tile % 2];
      Window<Places, T>& next = windows[(tile + 1) % 2];
      next.move_to(band, end, images, std::min(tile + 1, last - 1));
      float* out = v + tile * width;
      for (int64_t c = 0; c < end.channels; c += kLanes) {
        V middle[F::points][Places], in[Places], mapped[F::points];
#pragma GCC unroll 9
        for (int64_t j = 0; j < Places; ++j) {
#pragma GCC unroll 9
          for (int64_t i = 0; i < Places; ++i) {
            in[i] = load_as<float>(window.at[i][j] + c);
            __builtin_prefetch(next.at[i][j] + c);
          }
          map(in, mapped);
#pragma GCC unroll 9
          for (int64_t i = 0; i < F::points; ++i) middle[i][j] = mapped[i];
        }
#pragma GCC unroll 9
        for (int64_t i = 0; i < F::points; ++i) {
          if (i < rows.first || i >= rows.last) continue;
          map(middle[i], mapped);
          float* row = out + (i - rows.first) * F::points * pitch + c;
#pragma GCC unroll 9
          for (int64_t j = 0; j < F::points; ++j) store<float>(mapped[j], row + j * pitch);
        }
      }
      for (int64_t c = end.channels; c < width; c += kLanes) {
        for (int64_t k = 0; k < rows.count() * F::points; ++k) store<float>(V{}, out + k * pitch + c);
      }
    }
  });
}

// The way back: m [points^2][tiles, width] -> images. Where tiles overlap (Places > step) they add up in the first row
// and column of each; then the tile rows of an image go one after another.
template <class F, int Places, Map map, class T>
void from_points(const Band& band, const End& end, const float* m, int64_t pitch, int64_t width, T* images) {
  const int64_t together = Places > F::tile ? band.rows : 1;  // tile rows
  const auto first_pixel = [&](int64_t tile) {
    const int64_t job = tile / band.columns, row = band.first_row + job % band.rows;
    const int64_t pixel_row = (band.first_image + job / band.rows) * end.size + row * end.step;
    return images + (pixel_row * end.size + tile % band.columns * end.step) * end.channels;
  };
  parallel(band.tile_rows() / together, 1 + 65536 / (together * band.columns * width * F::points),
           [&](int64_t from, int64_t to) {
             const int64_t last = to * together * band.columns;
             for (int64_t tile = from * together * band.columns; tile < last; ++tile) {
               const bool below = band.first_row + tile / band.columns % band.rows > 0;
               const bool beside = tile % band.columns > 0;
               const float* in_tile = m + tile * width;
               T* out = first_pixel(tile);
               const T* next = tile + 1 < last ? first_pixel(tile + 1) : out;
               for (int64_t c = 0; c < end.channels; c += kLanes) {
                 V middle[Places][F::points], in[F::points], mapped[Places];
#pragma GCC unroll 9
                 for (int64_t j = 0; j < F::points; ++j) {
#pragma GCC unroll 9
                   for (int64_t i = 0; i < F::points; ++i) in[i] = load(in_tile + (i * F::points + j) * pitch + c);
                   map(in, mapped);
#pragma GCC unroll 9
                   for (int64_t i = 0; i < Places; ++i) middle[i][j] = mapped[i];
                 }
#pragma GCC unroll 9
                 for (int64_t i = 0; i < Places; ++i) {
                   map(middle[i], mapped);
#pragma GCC unroll 9
                   for (int64_t j = 0; j < Places; ++j) {
                     const int64_t at = (i * end.size + j) * end.channels + c;
                     __builtin_prefetch(next + at, 1);
                     const bool shared = Places > F::tile && ((i == 0 && below) || (j == 0 && beside));
                     store_as<float>(shared ? mapped[j] + load_as<float>(out + at) : mapped[j], out + at);
                   }
                 }
               }
             }
           });
}

// scale G w G^T -> [matrices^2, `pitch` apart][panels][depth, kPanel], zeros beyond the columns
template <class F>
void pack_taps(const float* weight, int64_t column_stride, int64_t columns, int64_t depth_stride, int64_t depth,
               bool turned, float scale, float* packed, int64_t pitch) {
  const int64_t panels = panels_of(columns);
  parallel(depth, 1 + 4096 / columns, [=](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < panels * kPanel; o += kLanes) {
      for (int64_t c = begin; c < end; ++c) {
        float* to = packed + (o / kPanel * depth + c) * kPanel + o % kPanel;
        V g[9] = {};
        if (o < columns) load_taps(weight + o * column_stride + c * depth_stride, column_stride, g);
        if (turned) std::reverse(g, g + 9);
        for (V& tap : g) tap *= scale;
        for (int64_t i = 0; i < F::matrices; ++i) {
          const float g0 = float(F::G[i][0]), g1 = float(F::G[i][1]), g2 = float(F::G[i][2]);
          V row[3];
          for (int64_t k = 0; k < 3; ++k) row[k] = g0 * g[k] + g1 * g[3 + k] + g2 * g[6 + k];
          for (int64_t j = 0; j < F::matrices; ++j) {
            const V u = float(F::G[j][0]) * row[0] + float(F::G[j][1]) * row[1] + float(F::G[j][2]) * row[2];
            store<float>(u, to + (i * F::matrices + j) * pitch);
          }
        }
      }
    }
  });
}

// du [matrices^2, `pitch` apart][c_in, panels * kPanel] -> scale G^T du G [c_out, c_in, 3, 3]
template <class F>
void unpack_gradient(const float* du, int64_t pitch, int64_t c_in, int64_t c_out, float scale, float* weight) {
  const int64_t width = panels_of(c_out) * kPanel;
  parallel(c_in, 1 + 4096 / c_out, [=](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < c_out; o += kLanes) {
      for (int64_t c = begin; c < end; ++c) {
        V g[9] = {};
        for (int64_t i = 0; i < F::matrices; ++i) {
          V row[3] = {};
          for (int64_t j = 0; j < F::matrices; ++j) {
            const V u = load(du + (i * F::matrices + j) * pitch + c * width + o);
            for (int64_t k = 0; k < 3; ++k) row[k] += float(F::G[j][k]) * u;
          }
          for (int64_t k = 0; k < 9; ++k) g[k] += float(F::G[i][k / 3]) * row[k % 3];
        }
        for (V& tap : g) tap *= scale;
        store_taps(g, weight + (o * c_in + c) * 9, c_in * 9);
      }
    }
  });
}

template <class S, class T>
class TransformedConv {
  using F = typename S::F;
  static constexpr int64_t kPoints = F::points * F::points, kMatrices = F::matrices * F::matrices;
  static constexpr PointRows kAllRows{0, F::points};

 public:
  // depth and columns of the products: channels of what is read and of what is written
  TransformedConv(const Conv3x3Params& p, int64_t depth, int64_t columns, Workspace& workspace)
      : p_(p),
        x_{p.x_size(), p.x_channels, S::step, S::edge},
        y_{p.size, p.y_channels, 4, 0},
        depth_(depth),
        width_(panels_of(columns) * kPanel),
        across_(p.size / 4),
        bands_(p.n, across_, kPoints * (depth_ + width_) * int64_t(sizeof(float)),
               kMatrices * depth_ * width_ * int64_t(sizeof(float))) {
    const int64_t tiles = bands_.most_rows() * across_;
    pitch_ = {tiles * depth_ + 16, round_up(tiles * width_, 16) + 16, weight_pitch(depth, columns)};
    v_ = workspace.get(Workspace::transformed, kPoints * pitch_.v);
    m_ = workspace.get(Workspace::products, kPoints * pitch_.m);
  }

  static int64_t weight_pitch(int64_t depth, int64_t columns) { return panels_of(columns) * kPanel * depth + 16; }
  static float* weights(int64_t depth, int64_t columns, Workspace& workspace) {
    return workspace.get(Workspace::packed, kMatrices * weight_pitch(depth, columns));
  }

  void y_from_x(const T* x, const float* packed, T* y) {
    on_threads(1, [&](TransformedConv& self, int64_t begin, int64_t end) {
      self.bands_.for_each(begin, end, [&](const Band& band) {
        to_points<F, S::window, S::A>(band, x_, x, depth_, kAllRows, self.v_, self.pitch_.v);
        self.product(band, packed);
        from_points<F, 4, S::C>(band, y_, self.m_, self.pitch_.m, width_, y);
      });
    });
  }

  void x_from_y(const T* y, const float* packed, T* x) {
    static_assert(S::step > 4, "at stride 1 the convolution with turned taps needs no overlap");
    on_threads(across_, [&](TransformedConv& self, int64_t begin, int64_t end) {  // whole images: their tiles add up
      self.bands_.for_each(begin, end, [&](const Band& band) {
        to_points<F, 4, S::C_t>(band, y_, y, depth_, kAllRows, self.v_, self.pitch_.v);
        self.product(band, packed);
        from_points<F, S::window, S::A_t>(band, x_, self.m_, self.pitch_.m, width_, x);
      });
    });
  }

 private:
  void product(const Band& band, const float* packed) {
    multiply<Fp32Products, F>(v_, packed, band.tiles(), depth_, width_ / kPanel, m_, pitch_);
  }

  // work(self, begin, end) over tile rows, `unit` of them together; a thread has buffers of its own.
  template <class Work>
  void on_threads(int64_t unit, Work&& work) {
    const int64_t rows = p_.n * across_;
    if (!bands_.for_each_thread()) return work(*this, 0, rows);
    parallel(rows / unit, 1 + 1 / unit, [&](int64_t begin, int64_t end) {
      TransformedConv own(p_, depth_, width_, thread_workspace());
      work(own, begin * unit, end * unit);
    });
  }

  const Conv3x3Params& p_;
  const End x_, y_;
  const int64_t depth_, width_, across_;
  const Bands bands_;
  Pitches pitch_;
  float *v_, *m_;
};

template <class S, class T>
void forward(const T* x, const float* weight, const Conv3x3Params& p, bool turned, Workspace& workspace, T* y) {
  const int64_t depth = p.x_channels, columns = p.y_channels;
  using Conv = TransformedConv<S, T>;
  float* packed = Conv::weights(depth, columns, workspace);
  pack_taps<typename S::F>(weight, p.weight_stride_y, columns, p.weight_stride_x, depth, turned, p.scale, packed,
                           Conv::weight_pitch(depth, columns));
  Conv(p, depth, columns, workspace).y_from_x(x, packed, y);
}

template <class T>
void transposed(const T* y, const float* weight, const Conv3x3Params& p, Workspace& workspace, T* x) {
  Conv3x3Params turned = p;
  std::swap(turned.x_channels, turned.y_channels);
  std::swap(turned.weight_stride_x, turned.weight_stride_y);
  forward<Stride1>(y, weight, turned, true, workspace, x);
}

void transposed2(const float* y, const float* weight, const Conv3x3Params& p, Workspace& workspace, float* x) {
  const int64_t depth = p.y_channels, columns = p.x_channels;
  using Conv = TransformedConv<Stride2, float>;
  float* packed = Conv::weights(depth, columns, workspace);
  pack_taps<Stride2::F>(weight, p.weight_stride_x, columns, p.weight_stride_y, depth, false, p.scale, packed,
                        Conv::weight_pitch(depth, columns));
  Conv(p, depth, columns, workspace).x_from_y(y, packed, x);
}

// du [matrices^2, `pitch` apart][depth, width] of some rows of points, summed over bands that depend on neither these
// rows nor the threads. Bands of twice the usual size, since each reads and writes du.
template <class S, class T>
void weight_gradient(const T* x, const T* y, const Conv3x3Params& p, const PointRows& rows, int64_t width, float* du,
                     int64_t pitch, Workspace& workspace) {
  using F = typename S::F;
  const End x_end{p.x_size(), p.x_channels, S::step, S::edge}, y_end{p.size, p.y_channels, 4, 0};
  const int64_t depth = p.x_channels, across = p.size / 4, points = rows.count() * F::points;
  const Bands bands(p.n, across, F::points * F::points * (depth + width) * int64_t(sizeof(float)) / 2, 0);
  const int64_t tiles = bands.most_rows() * across;
  const Pitches pitches{tiles * depth + 16, round_up(tiles * width, 16) + 16, pitch};
  float* v = workspace.get(Workspace::transformed, points * pitches.v);
  float* m = workspace.get(Workspace::products, points * pitches.m);
  bands.for_each(0, p.n * across, [&](const Band& band) {
    to_points<F, S::window, S::A>(band, x_end, x, depth, rows, v, pitches.v);
    to_points<F, 4, S::C_t>(band, y_end, y, width, rows, m, pitches.m);
    multiply_transposed<F>(v, m, rows.first, rows.last, band.tiles(), depth, width / kPanel, du, pitches);
  });
}

// A thread takes rows of points and transforms all tiles to them by itself, with no barrier between the steps. Rows
// that share their weights stay together, with the thread in whose part they begin.
template <class S, class T>
void taps(const T* x, const T* y, const Conv3x3Params& p, Workspace& workspace, float* weight) {
  using F = typename S::F;
  using Conv = TransformedConv<S, T>;
  const int64_t depth = p.x_channels, columns = p.y_channels, width = panels_of(columns) * kPanel;
  const int64_t pitch = Conv::weight_pitch(depth, columns), across = p.size / 4;
  float* du = Conv::weights(depth, columns, workspace);
  std::memset(du, 0, F::matrices * F::matrices * pitch * sizeof(float));
  const int64_t work = p.n * across * across * F::points * depth * width;  // of a row of points
  parallel(F::points, 1 + 400000 / (work + 1), [&](int64_t begin, int64_t end) {
    const auto begins_at = [](int64_t row) { return row < F::matrices ? row : int64_t(F::points); };
    const PointRows rows{begins_at(begin), begins_at(end)};
    if (rows.count() > 0) weight_gradient<S>(x, y, p, rows, width, du, pitch, thread_workspace());
  });
  unpack_gradient<F>(du, pitch, depth, columns, p.scale, weight);
}

// f(T()) for the type of the images at stride 1
template <class F>
void with_images(Dtype dtype, F&& f) {
  if (dtype == Dtype::float32) return f(float());
  f(BFloat16());
}

}  // namespace

void conv3x3(const void* x, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* y) {
#ifdef SAGE_BF16
  if (p.strided_bf16()) return strided_conv3x3(x, weight, p, workspace, y);
#endif
  if (p.stride == 2) return forward<Stride2>((const float*)x, weight, p, false, workspace, (float*)y);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    forward<Stride1>((const T*)x, weight, p, false, workspace, (T*)y);
  });
}

void conv3x3_transposed(const void* y, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* x) {
#ifdef SAGE_BF16
  if (p.strided_bf16()) return strided_conv3x3_transposed(y, weight, p, workspace, x);
#endif
  if (p.stride == 2) return transposed2((const float*)y, weight, p, workspace, (float*)x);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    transposed((const T*)y, weight, p, workspace, (T*)x);
  });
}

void conv3x3_taps(const void* x, const void* y, const Conv3x3Params& p, Workspace& workspace, float* weight) {
#ifdef SAGE_BF16
  if (p.strided_bf16()) return strided_conv3x3_taps(x, y, p, workspace, weight);
#endif
  if (p.stride == 2) return taps<Stride2>((const float*)x, (const float*)y, p, workspace, weight);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    taps<Stride1>((const T*)x, (const T*)y, p, workspace, weight);
  });
}

}  // namespace sage_fast::SAGE_ISA
