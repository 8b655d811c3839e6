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

// One end of a convolution: images [n, size, size, channels] seen by tiles `step` apart that begin `edge` outside.
struct End {
  int64_t size, channels, step, edge;
};

// Tiles of one end to the points: images -> v [points^2][tiles, width], zeros beyond the channels and the image.
template <class F, int Places, class T, class Map>
void to_points(const Band& band, const End& end, const T* images, Map&& map, int64_t width, float* v, int64_t pitch) {
  parallel(band.tile_rows(), 1 + 65536 / (band.columns * width * F::points), [&](int64_t from, int64_t to) {
    alignas(64) static const T zeros[4096] = {};
    for (int64_t job = from; job < to; ++job) {
      const int64_t image = band.first_image + job / band.rows, row = band.first_row + job % band.rows;
      for (int64_t column = 0; column < band.columns; ++column) {
        const T* at[Places][Places];
        for (int64_t i = 0; i < Places; ++i) {
          for (int64_t j = 0; j < Places; ++j) {
            const int64_t y = row * end.step + i - end.edge, x = column * end.step + j - end.edge;
            const bool inside = y >= 0 && y < end.size && x >= 0 && x < end.size;
            at[i][j] = inside ? images + ((image * end.size + y) * end.size + x) * end.channels : zeros;
          }
        }
        float* out = v + (job * band.columns + column) * width;
        for (int64_t c = 0; c < width; c += kLanes) {
          V middle[F::points][Places], in[Places], mapped[F::points];
          for (int64_t j = 0; j < Places; ++j) {
            for (int64_t i = 0; i < Places; ++i) in[i] = c < end.channels ? load_as<float>(at[i][j] + c) : V{};
            map(in, mapped);
            for (int64_t i = 0; i < F::points; ++i) middle[i][j] = mapped[i];
          }
          for (int64_t i = 0; i < F::points; ++i) {
            map(middle[i], mapped);
            for (int64_t j = 0; j < F::points; ++j) store<float>(mapped[j], out + (i * F::points + j) * pitch + c);
          }
        }
      }
    }
  });
}

// The way back: m [points^2][tiles, width] -> images. Where tiles overlap (Places > step) they add up in the first row
// and column of each; then the tile rows of an image go one after another.
template <class F, int Places, class T, class Map>
void from_points(const Band& band, const End& end, const float* m, int64_t pitch, Map&& map, int64_t width, T* images) {
  const int64_t together = Places > F::tile ? band.rows : 1;  // tile rows
  parallel(band.tile_rows() / together, 1 + 65536 / (together * band.columns * width * F::points),
           [&](int64_t from, int64_t to) {
             for (int64_t job = from * together; job < to * together; ++job) {
               const int64_t image = band.first_image + job / band.rows, row = band.first_row + job % band.rows;
               for (int64_t column = 0; column < band.columns; ++column) {
                 const float* in_tile = m + (job * band.columns + column) * width;
                 T* out = images + ((image * end.size + row * end.step) * end.size + column * end.step) * end.channels;
                 for (int64_t c = 0; c < end.channels; c += kLanes) {
                   V middle[Places][F::points], in[F::points], mapped[Places];
                   for (int64_t j = 0; j < F::points; ++j) {
                     for (int64_t i = 0; i < F::points; ++i) in[i] = load(in_tile + (i * F::points + j) * pitch + c);
                     map(in, mapped);
                     for (int64_t i = 0; i < Places; ++i) middle[i][j] = mapped[i];
                   }
                   for (int64_t i = 0; i < Places; ++i) {
                     map(middle[i], mapped);
                     for (int64_t j = 0; j < Places; ++j) {
                       T* at = out + (i * end.size + j) * end.channels + c;
                       const bool shared = Places > F::tile && ((i == 0 && row > 0) || (j == 0 && column > 0));
                       store_as<float>(shared ? mapped[j] + load_as<float>(at) : mapped[j], at);
                     }
                   }
                 }
               }
             }
           });
}

// The first 9 numbers of kLanes rows that lie `stride` apart, as 9 vectors over the rows.
inline void load_taps(const float* from, int64_t stride, V* g) {
#if SAGE_VECTOR_BYTES == 64
  V rows[16], mixed[16];  // four times: row i and row i + 8 interleaved are rows 2 i and 2 i + 1
  for (int i = 0; i < 16; ++i) rows[i] = load_first<float>(from + i * stride, 9);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = (V)_mm512_permutex2var_ps((__m512)rows[i], low, (__m512)rows[i + 8]);
      mixed[2 * i + 1] = (V)_mm512_permutex2var_ps((__m512)rows[i], high, (__m512)rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
  for (int k = 0; k < 9; ++k) g[k] = rows[k];
#else
  for (int64_t k = 0; k < 9; ++k) {
    for (int64_t l = 0; l < kLanes; ++l) g[k][l] = from[l * stride + k];
  }
#endif
}

// G w G^T -> [matrices^2, `pitch` apart][panels][depth, kPanel], zeros beyond the columns
template <class F>
void pack_taps(const float* weight, int64_t column_stride, int64_t columns, int64_t depth_stride, int64_t depth,
               bool turned, float* packed, int64_t pitch) {
  const int64_t panels = panels_of(columns);
  parallel(depth, 1 + 4096 / columns, [=](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < panels * kPanel; o += kLanes) {
      for (int64_t c = begin; c < end; ++c) {
        float* to = packed + (o / kPanel * depth + c) * kPanel + o % kPanel;
        V g[9] = {};
        if (o < columns) load_taps(weight + o * column_stride + c * depth_stride, column_stride, g);
        if (turned) std::reverse(g, g + 9);
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

// du [matrices^2, `pitch` apart][c_in, panels * kPanel] -> G^T du G [c_out, c_in, 3, 3]
template <class F>
void unpack_gradient(const float* du, int64_t pitch, int64_t c_in, int64_t c_out, float* weight) {
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
        for (int64_t l = 0; l < kLanes; ++l) {
          for (int64_t k = 0; k < 9; ++k) weight[((o + l) * c_in + c) * 9 + k] = g[k][l];
        }
      }
    }
  });
}

template <class S, class T>
class TransformedConv {
  using F = typename S::F;
  static constexpr int64_t kPoints = F::points * F::points, kMatrices = F::matrices * F::matrices;

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
        to_points<F, S::window>(band, x_, x, S::A, depth_, self.v_, self.pitch_.v);
        self.product(band, packed);
        from_points<F, 4>(band, y_, self.m_, self.pitch_.m, S::C, width_, y);
      });
    });
  }

  void x_from_y(const T* y, const float* packed, T* x) {
    static_assert(S::step > 4, "at stride 1 the convolution with turned taps needs no overlap");
    on_threads(across_, [&](TransformedConv& self, int64_t begin, int64_t end) {  // whole images: their tiles add up
      self.bands_.for_each(begin, end, [&](const Band& band) {
        to_points<F, 4>(band, y_, y, S::C_t, depth_, self.v_, self.pitch_.v);
        self.product(band, packed);
        from_points<F, S::window>(band, x_, self.m_, self.pitch_.m, S::A_t, width_, x);
      });
    });
  }

  // du [matrices^2, a weight pitch apart][x_channels, panels * kPanel]
  void weight_gradient(const T* x, const T* y, float* du) {
    std::memset(du, 0, kMatrices * pitch_.u * sizeof(float));
    bands_.for_each(0, p_.n * across_, [&](const Band& band) {
      to_points<F, S::window>(band, x_, x, S::A, depth_, v_, pitch_.v);
      to_points<F, 4>(band, y_, y, S::C_t, width_, m_, pitch_.m);
      multiply_transposed<F>(v_, m_, band.tiles(), depth_, width_ / kPanel, du, pitch_);
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
  pack_taps<typename S::F>(weight, p.weight_stride_y, columns, p.weight_stride_x, depth, turned, packed,
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
  pack_taps<Stride2::F>(weight, p.weight_stride_x, columns, p.weight_stride_y, depth, false, packed,
                        Conv::weight_pitch(depth, columns));
  Conv(p, depth, columns, workspace).x_from_y(y, packed, x);
}

template <class S, class T>
void taps(const T* x, const T* y, const Conv3x3Params& p, Workspace& workspace, float* weight) {
  const int64_t depth = p.x_channels, columns = p.y_channels;
  using Conv = TransformedConv<S, T>;
  float* du = Conv::weights(depth, columns, workspace);
  Conv(p, depth, columns, workspace).weight_gradient(x, y, du);
  unpack_gradient<typename S::F>(du, Conv::weight_pitch(depth, columns), depth, columns, weight);
}

// f(T()) for the type of the images at stride 1
template <class F>
void with_images(Dtype dtype, F&& f) {
  if (dtype == Dtype::float32) return f(float());
  f(BFloat16());
}

}  // namespace

void conv3x3(const void* x, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* y) {
  if (p.stride == 2) return forward<Stride2>((const float*)x, weight, p, false, workspace, (float*)y);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    forward<Stride1>((const T*)x, weight, p, false, workspace, (T*)y);
  });
}

void conv3x3_transposed(const void* y, const float* weight, const Conv3x3Params& p, Workspace& workspace, void* x) {
  if (p.stride == 2) return transposed2((const float*)y, weight, p, workspace, (float*)x);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    transposed((const T*)y, weight, p, workspace, (T*)x);
  });
}

void conv3x3_taps(const void* x, const void* y, const Conv3x3Params& p, Workspace& workspace, float* weight) {
  if (p.stride == 2) return taps<Stride2>((const float*)x, (const float*)y, p, workspace, weight);
  with_images(p.dtype, [&](auto type) {
    using T = decltype(type);
    taps<Stride1>((const T*)x, (const T*)y, p, workspace, weight);
  });
}

}  // namespace sage_fast::SAGE_ISA
