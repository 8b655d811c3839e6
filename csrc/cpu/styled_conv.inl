// One styled layer: style, 3 x 3 convolution in the transform's domain, demodulation, noise, bias, leaky ReLU.
//
// The image is cut into tiles, the tiles into bands whose intermediate results stay in the shared cache. For each band:
//   1. gather:   style times input, transformed            x -> v [points^2][tiles, depth]
//   2. multiply: one small matrix product a point          v, u -> m [points^2][tiles, columns]
//   3. plain: transform back, epilogue                     m -> y
//      up: transform back to the stride-2 transposed convolution (m -> z), then blur [1, 3, 3, 1] and epilogue (z -> y)

#pragma once

#include "../synthesis.h"
#include "bands.inl"
#include "gemm.inl"
#include "transforms.inl"
#include "workspace.h"

namespace sage_fast::SAGE_ISA {

inline int64_t pitch_of(int64_t channels) { return round_up(channels, kLanes); }

// What a layer needs besides its own description; styles and factors padded with zeros.
struct LayerData {
  int64_t n;
  const float* x;       // [n, size_in, size_in, pitch_in]
  const float* style;   // [n, pitch_in]
  const float* factor;  // [n, pitch_out] demodulation times gain
  const float* bias;    // [pitch_out] times gain
  float slope, gain, clamp;
  float* y;  // [n, size, size, pitch_out] // output
};

struct Epilogue {
  V slope, low, high;
  bool clamps;

  explicit Epilogue(const LayerData& d)
      : slope(V{} + d.slope), low(V{} - d.clamp), high(V{} + d.clamp), clamps(d.clamp >= 0) {}
  V operator()(V v) const {
    const V scaled = slope * v;
    v = v > scaled ? v : scaled;  // slope is at most 1
    if (clamps) {
      v = v > high ? high : v;
      v = v < low ? low : v;
    }
    return v;
  }
};

inline float noise_at(const StyledLayer& layer, int64_t image, int64_t pixel) {
  return layer.noise[(layer.noise_per_sample ? image * layer.size * layer.size : 0) + pixel];
}

template <class P, int M, bool Up>
class StyledConv {
  using F = Transform<M, Up>;
  using T = typename P::type;
  static constexpr int64_t kPoints = F::points * F::points, kMatrices = F::matrices * F::matrices;

 public:
  StyledConv(const StyledLayer& layer, const LayerData& data, Workspace& workspace)
      : layer_(layer),
        data_(data),
        size_(layer.up ? layer.size / 2 : layer.size),
        pitch_in_(pitch_of(layer.c_in)),
        pitch_out_(pitch_of(layer.c_out)),
        panels_(panels_of(layer.c_out)),
        tiles_across_(size_ / F::tile),
        bands_(data.n, tiles_across_,
               kPoints * (pitch_in_ * int64_t(sizeof(T)) + panels_ * kPanel * int64_t(sizeof(float))), weight_bytes()) {
    const int64_t tiles = bands_.most_rows() * tiles_across_;
    v_pitch_ = round_up(tiles * pitch_in_, 16 / F::tile * 16) + 16 * (sizeof(float) / sizeof(T));
    m_pitch_ = round_up(tiles * panels_ * kPanel, 16) + 16;
    v_ = reinterpret_cast<T*>(
        workspace.get(Workspace::transformed, kPoints * v_pitch_ * int64_t(sizeof(T)) / 4 + kLanes));
    m_ = workspace.get(Workspace::products, kPoints * m_pitch_);
    if (Up) {
      z_row_ = (2 * size_ + 1) * pitch_out_;
      z_ = workspace.get(Workspace::before_blur, (bands_.most_rows() + 1) * F::outputs * z_row_);
    }
  }

  void run() {
    const int64_t tile_rows = data_.n * tiles_across_;
    if (!bands_.for_each_thread()) return run_rows(0, tile_rows);
    parallel(tile_rows, 2,
             [&](int64_t begin, int64_t end) { StyledConv(layer_, data_, thread_workspace()).run_rows(begin, end); });
  }

 private:
  void to_points(const Band& band) {
    gather(band);
    multiply<P, F>(v_, static_cast<const T*>(layer_.packed), band.tiles(), pitch_in_, panels_, m_,
                   {v_pitch_, m_pitch_, packed_pitch<P>(pitch_in_, panels_)});
  }

  // Tile rows `begin` to `end` of all images.
  void run_rows(int64_t begin, int64_t end) {
    if (Up && begin % tiles_across_ > 0) {  // the blur of the first rows meets the tile row above
      const Band above{begin / tiles_across_, 1, begin % tiles_across_ - 1, 1, tiles_across_};
      to_points(above);
      scatter(above);
      keep_last(above);
    }
    bands_.for_each(begin, end, [&](const Band& band) {
      to_points(band);
      if constexpr (Up) {
        scatter(band);
        blur(band);
        keep_last(band);
      } else {
        finish(band);
      }
    });
  }

  // The next band's blur begins in this one's last tile row.
  void keep_last(const Band& band) {
    const int64_t patch = F::outputs * z_row_;
    std::memcpy(z_, z_ + band.tile_rows() * patch, patch * sizeof(float));
  }

  int64_t weight_bytes() const { return kMatrices * pitch_in_ * panels_ * kPanel * int64_t(sizeof(T)); }

  int64_t grain(int64_t per_tile_row) const { return 1 + 65536 / (per_tile_row + 1); }

  // Pixels of the next tile are fetched meanwhile: a window has too many streams for the processor to foresee.
  void gather(const Band& band) {
    const End end{size_, pitch_in_, F::tile, Up ? 0 : 1};
    parallel(band.tile_rows(), grain(tiles_across_ * pitch_in_ * kPoints), [&](int64_t from, int64_t to) {
      const int64_t last = to * tiles_across_;
      Window<F::inputs, float> windows[2];
      windows[from * tiles_across_ % 2].move_to(band, end, data_.x, from * tiles_across_);
      for (int64_t tile = from * tiles_across_; tile < last; ++tile) {
        const Window<F::inputs, float>& window = windows[tile % 2];
        Window<F::inputs, float>& next = windows[(tile + 1) % 2];
        next.move_to(band, end, data_.x, std::min(tile + 1, last - 1));
        const float* style = data_.style + (band.first_image + tile / tiles_across_ / band.rows) * pitch_in_;
        T* out_tile = v_ + tile * pitch_in_;
        for (int64_t c = 0; c < pitch_in_; c += kLanes) {
          const V s = load(style + c);
          V middle[F::points][F::inputs], in[F::inputs], out[F::points];
#pragma GCC unroll 9
          for (int64_t j = 0; j < F::inputs; ++j) {
#pragma GCC unroll 9
            for (int64_t i = 0; i < F::inputs; ++i) {
              in[i] = s * load(window.at[i][j] + c);
              __builtin_prefetch(next.at[i][j] + c);
            }
            F::forward(in, out);
#pragma GCC unroll 9
            for (int64_t i = 0; i < F::points; ++i) middle[i][j] = out[i];
          }
#pragma GCC unroll 9
          for (int64_t i = 0; i < F::points; ++i) {
            F::forward(middle[i], out);
#pragma GCC unroll 9
            for (int64_t j = 0; j < F::points; ++j) P::put(out[j], out_tile + (i * F::points + j) * v_pitch_ + c);
          }
        }
      }
    });
  }

  // One tile's products back to pixels: emit(row, values [outputs]) for channels c to c + kLanes.
  template <class Emit>
  void back(const float* from, Emit&& emit) const {
    V middle[F::outputs][F::points], in[F::points], out[F::outputs];
#pragma GCC unroll 9
    for (int64_t j = 0; j < F::points; ++j) {
#pragma GCC unroll 9
      for (int64_t i = 0; i < F::points; ++i) in[i] = load(from + (i * F::points + j) * m_pitch_);
      F::inverse(in, out);
#pragma GCC unroll 9
      for (int64_t i = 0; i < F::outputs; ++i) middle[i][j] = out[i];
    }
#pragma GCC unroll 9
    for (int64_t i = 0; i < F::outputs; ++i) {
      F::inverse(middle[i], out);
      emit(i, out);
    }
  }

  void finish(const Band& band) {
    parallel(band.tile_rows(), grain(tiles_across_ * pitch_out_ * kPoints), [&](int64_t begin, int64_t end) {
      const Epilogue act(data_);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t image = band.first_image + job / band.rows, row = band.first_row + job % band.rows;
        const float* factor = data_.factor + image * pitch_out_;
        for (int64_t column = 0; column < tiles_across_; ++column) {
          float noise[F::outputs][F::outputs] = {};
          for (int64_t i = 0; layer_.noise != nullptr && i < F::outputs; ++i) {
            for (int64_t j = 0; j < F::outputs; ++j) {
              const int64_t pixel = (row * F::tile + i) * size_ + column * F::tile + j;
              noise[i][j] = noise_at(layer_, image, pixel) * (layer_.strength * data_.gain);
            }
          }
          const float* from = m_ + (job * tiles_across_ + column) * panels_ * kPanel;
          float* to = data_.y + ((image * size_ + row * F::tile) * size_ + column * F::tile) * pitch_out_;
          for (int64_t c = 0; c < pitch_out_; c += kLanes) {
            const V f = load(factor + c), b = load(data_.bias + c);
            back(from + c, [&](int64_t i, const V* values) {
              for (int64_t j = 0; j < F::outputs; ++j) {
                float* at = to + (i * size_ + j) * pitch_out_ + c;
                __builtin_prefetch(at + F::outputs * pitch_out_, 1);  // the next tile's
                store<float>(act(values[j] * f + (b + noise[i][j])), at);
              }
            });
          }
        }
      }
    });
  }

  // Slot 0 keeps the tile row before the band's first; a slot has 2 M rows of z and one that belongs to the next slot.
  float* z_slot(int64_t job) const { return z_ + (job + 1) * F::outputs * z_row_; }

  void scatter(const Band& band) {
    parallel(band.tile_rows(), grain(tiles_across_ * pitch_out_ * kPoints), [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        for (int64_t column = 0; column < tiles_across_; ++column) {
          const float* from = m_ + (job * tiles_across_ + column) * panels_ * kPanel;
          float* to = z_slot(job) + column * 2 * F::tile * pitch_out_;
          for (int64_t c = 0; c < pitch_out_; c += kLanes) {
            back(from + c, [&](int64_t i, const V* values) {
              float* at = to + i * z_row_ + c;
              store<float>(column > 0 ? values[0] + load(at) : values[0], at);  // shared with the tile to the left
              for (int64_t j = 1; j < F::outputs; ++j) store<float>(values[j], at + j * pitch_out_);
            });
          }
        }
      }
    });
  }

  // y = act(factor * blur(z) + noise + bias); row o of y meets rows o - 1 to o + 2 of z.
  void blur(const Band& band) {
    const int64_t step = 2 * F::tile, last = band.first_row + band.rows;
    const int64_t from = band.first_row == 0 ? 0 : band.first_row * step - 2;
    const int64_t to = last == tiles_across_ ? layer_.size : last * step - 2;
    const int64_t rows = to - from;
    parallel(band.images * rows, grain(layer_.size * pitch_out_ * 8), [&](int64_t begin, int64_t end) {
      const Epilogue act(data_);
      Buffer<float> zeros(z_row_);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t image = job / rows, o = from + job % rows;
        const float *near[4], *carried = zeros.data();
        float tap_of_carried = 0;
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t k = o - 1 + i, tile = k / step, slot = image * band.rows + tile - band.first_row;
          near[i] = zeros.data();
          if (k < 0 || k > layer_.size) continue;
          if (tile < tiles_across_) near[i] = z_slot(slot) + k % step * z_row_;
          if (k % step == 0 && tile > 0) {  // the tile row above adds to its first row
            carried = z_slot(slot - 1) + step * z_row_;
            tap_of_carried = kTaps[i];
          }
        }
        blur_row(near, carried, tap_of_carried, act, band.first_image + image, o);
      }
    });
  }

  void blur_row(const float* const* near, const float* carried, float tap, const Epilogue& act, int64_t image,
                int64_t o) const {
    const int64_t size = layer_.size;
    float* to = data_.y + (image * size + o) * size * pitch_out_;
    const float* noise = layer_.noise == nullptr
                             ? nullptr
                             : &layer_.noise[0] + (layer_.noise_per_sample ? image * size * size : 0) + o * size;
    const float strength = layer_.strength * data_.gain;
    for (int64_t c = 0; c < pitch_out_; c += kLanes) {
      const V f = load(data_.factor + image * pitch_out_ + c), b = load(data_.bias + c);
      const auto column = [&](int64_t x) {
        const int64_t at = x * pitch_out_ + c;
        return kTaps[0] * (load(near[0] + at) + load(near[3] + at)) +
               kTaps[1] * (load(near[1] + at) + load(near[2] + at)) + tap * load(carried + at);
      };
      V v0 = {}, v1 = column(0), v2 = column(1);
      for (int64_t x = 0; x < size; ++x) {
        const V v3 = x + 2 <= size ? column(x + 2) : V{};
        const V y = (kTaps[0] * (v0 + v3) + kTaps[1] * (v1 + v2)) * f + (b + (noise ? noise[x] * strength : 0.f));
        store<float>(act(y), to + x * pitch_out_ + c);
        v0 = v1;
        v1 = v2;
        v2 = v3;
      }
    }
  }

  static constexpr float kTaps[4] = {.25f, .75f, .75f, .25f};  // [1, 3, 3, 1] / 4: a gain of 2 a dimension

  const StyledLayer& layer_;
  const LayerData& data_;
  const int64_t size_, pitch_in_, pitch_out_, panels_, tiles_across_;
  const Bands bands_;
  int64_t v_pitch_, m_pitch_, z_row_ = 0;
  T* v_;
  float *m_, *z_ = nullptr;
};

}  // namespace sage_fast::SAGE_ISA
