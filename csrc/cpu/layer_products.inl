// Products of a matrix [dim, cols] with many short vectors, for project_onto_basis, edit_latents and
// least_squares_codes. Many samples share the matrix packed into panels; for one sample it is read once, as it lies.

#pragma once

namespace sage_fast::SAGE_ISA {
namespace {

// [rows, cols], `stride` apart, inside memory that ends at `end`.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols, stride;
  const T* end;
};

template <class T>
struct Products {
  using V = typename Vector<T>::type;
  static constexpr int64_t lanes = Vector<T>::lanes;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Lane Bits __attribute__((vector_size(SAGE_VECTOR_BYTES)));

  static constexpr int64_t vectors = 4, width = vectors * lanes;    // of a panel
  static constexpr int64_t tile = SAGE_VECTOR_BYTES == 64 ? 4 : 2;  // samples whose sums fit the registers
  static constexpr int64_t group = 8;                               // samples at a time: they stay in the L1 cache
  static constexpr int64_t columns = 5;                             // of a matrix that meet a tile at once

  template <size_t... i>
  static V low(V a, V b, std::index_sequence<i...>) {
    return lanes_of<(i % 2 * lanes + i / 2)...>(a, b);
  }
  template <size_t... i>
  static V high(V a, V b, std::index_sequence<i...>) {
    return lanes_of<(i % 2 * lanes + (lanes + i) / 2)...>(a, b);
  }
  static constexpr auto all = std::make_index_sequence<lanes>();

  // A square of lanes x lanes; each round moves one bit of the row number into the lane number.
  static void transpose(V* v) {
    for (int64_t done = 1; done < lanes; done *= 2) {
      V w[lanes];
      for (int64_t i = 0; i < lanes / 2; ++i) {
        w[2 * i] = low(v[i], v[i + lanes / 2], all);
        w[2 * i + 1] = high(v[i], v[i + lanes / 2], all);
      }
      for (int64_t i = 0; i < lanes; ++i) v[i] = w[i];
    }
  }

  // Lane i: the sum of all lanes of v[i]. Two vectors become one, in whose lanes with bit `half` the second goes on: a
  // pair costs one permutation, of the lanes that change their place; those that keep it are blended.
  template <int64_t half, size_t... i>
  static V halves(V a, V b, std::index_sequence<i...>) {
    return lanes_of<(i & half ? lanes + i : i)...>(a, b) + lanes_of<(i & half ? lanes + i - half : i + half)...>(a, b);
  }
  template <int64_t half = lanes / 2>
  static V sum_of_each(const V* v) {
    V w[half];
    for (int64_t i = 0; i < half; ++i) w[i] = halves<half>(v[i], v[i + half], all);
    if constexpr (half == 1) {
      return w[0];
    } else {
      return sum_of_each<half / 2>(w);
    }
  }

  static V only(V v, Bits bits) { return V(Bits(v) & bits); }

  // All bits in the lanes below n.
  static Bits below(int64_t n) {
    Bits bits;
    for (int64_t i = 0; i < lanes; ++i) bits[i] = i < n ? -1 : 0;
    return bits;
  }

  // `lanes` rows from row `first` on, whose vectors may be loaded in whole: the matrix itself or, near its end, a copy.
  static Matrix<T> rows_from(const Matrix<T>& m, int64_t first, Buffer<T>& copy) {
    const int64_t padded = round_up(m.cols, lanes), held = std::clamp<int64_t>(m.rows - first, 0, lanes);
    const T* data = m.data + first * m.stride;
    if (held == lanes && data + (lanes - 1) * m.stride + padded <= m.end) return {data, lanes, m.cols, m.stride, m.end};
    copy.assign(lanes * padded);
    for (int64_t i = 0; i < held; ++i) std::copy_n(data + i * m.stride, m.cols, copy.data() + i * padded);
    return {copy.data(), lanes, m.cols, padded, copy.data() + lanes * padded};
  }

  static int64_t panels_size(int64_t rows, int64_t cols) { return round_up(rows, width) * cols; }

  // [rows, cols] -> panels [rows / width, cols, width], zero beyond the last row up to a multiple of `fill`.
  static void pack(const Matrix<T>& m, T* panels, int64_t fill = width) {
    Buffer<T> copy;
    for (int64_t d = 0; d < round_up(m.rows, fill); d += lanes) {
      const Matrix<T> rows = rows_from(m, d, copy);
      T* to = panels + d / width * width * m.cols + d % width;
      for (int64_t c = 0; c < m.cols; c += lanes) {
        V v[lanes];
        for (int64_t i = 0; i < lanes; ++i) v[i] = load(rows.data + i * rows.stride + c);
        transpose(v);
        for (int64_t j = 0; j < std::min(lanes, m.cols - c); ++j) store<T>(v[j], to + (c + j) * width);
      }
    }
  }

  // A matrix whose columns are read `width` values at a time: panel p of column c at data + p * next + c * apart. With
  // dim % width other than 0 the last panel ends in zeros.
  struct Columns {
    const T* data;
    int64_t cols, apart, next;
    Columns from(int64_t first, int64_t count) const { return {data + first * apart, count, apart, next}; }
  };
  static Columns packed(const T* panels, int64_t cols) { return {panels, cols, width, width * cols}; }

  // sums[s * cols + c] = partial sums of w[s] . column first + c, for S samples and C columns.
  template <int64_t S, int64_t C>
  static void dots(const T* const* w, const T* const* tails, int64_t dim, const Columns& m, int64_t first, V* sums) {
    V sum[S][C];
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t c = 0; c < C; ++c) sum[s][c] = V{};
    }
    for (int64_t d = 0; d < dim; d += width) {
      const T* at[S];
      for (int64_t s = 0; s < S; ++s) at[s] = d + width <= dim ? w[s] + d : tails[s];
      const T* panel = m.data + d / width * m.next + first * m.apart;
      for (int64_t v = 0; v < width; v += lanes) {
        V in[S];
        for (int64_t s = 0; s < S; ++s) in[s] = in_register(load(at[s] + v));
        for (int64_t c = 0; c < C; ++c) {
          const T* at_column = panel + c * m.apart + v;
          if constexpr (S == 1) __builtin_prefetch(at_column + C * m.apart);  // one sample: the matrix from afar, once
          const V column = S > 1 ? in_register(load(at_column)) : load(at_column);  // else loaded for each sample
          for (int64_t s = 0; s < S; ++s) sum[s][c] += in[s] * column;
        }
      }
    }
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t c = 0; c < C; ++c) sums[s * m.cols + first + c] = sum[s][c];
    }
  }

  // C columns for all samples, so that they come from the L2 cache once.
  template <int64_t C>
  static void dots_of_all_samples(const T* const* w, const T* const* tails, int64_t n, int64_t dim, const Columns& m,
                                  int64_t first, V* sums) {
    int64_t s = 0;
    for (; s + tile <= n; s += tile) dots<tile, C>(w + s, tails + s, dim, m, first, sums + s * m.cols);
    for (; s < n; ++s) dots<1, C>(w + s, tails + s, dim, m, first, sums + s * m.cols);
  }

  // codes [n, cols] = w [n, dim] times the matrix, n up to `group`. codes has room for `lanes` more.
  static void reduce(const T* const* w, int64_t n, int64_t dim, const Columns& m, const Scratch<T>& sums, T* codes) {
    const int64_t full = dim / width * width;
    T padded[group][width];  // the last panel of each sample, where it is not full
    const T* tails[group];
    for (int64_t s = 0; s < n; ++s) {
      for (int64_t d = full; d < round_up(dim, width); ++d) padded[s][d - full] = d < dim ? w[s][d] : T(0);
      tails[s] = padded[s];
    }
    V* partial = reinterpret_cast<V*>(sums.data());
    // pieces of up to `columns`, as equal as can be: a tile of one column would wait for its loads
    int64_t pieces = (m.cols + columns - 1) / columns;
    for (int64_t c = 0, held; c < m.cols; c += held, --pieces) {
      held = (m.cols - c) / pieces;
      if (held == 5) dots_of_all_samples<5>(w, tails, n, dim, m, c, partial);
      if (held == 4) dots_of_all_samples<4>(w, tails, n, dim, m, c, partial);
      if (held == 3) dots_of_all_samples<3>(w, tails, n, dim, m, c, partial);
      if (held == 2) dots_of_all_samples<2>(w, tails, n, dim, m, c, partial);
      if (held == 1) dots_of_all_samples<1>(w, tails, n, dim, m, c, partial);
    }
    for (int64_t i = 0; i < n * m.cols; i += lanes) store<T>(sum_of_each(partial + i), codes + i);
  }
  static int64_t sums_size(int64_t cols) { return (group * cols + lanes) * lanes; }
  static int64_t codes_size(int64_t cols) { return group * cols + lanes; }

  // The other way to the codes: lanes lie across the columns of a matrix [dim][apart] whose columns fill whole vectors.
  // No lanes to be added at the end, but lanes without a column work for nothing, and the matrix must be laid out.
  static bool across_pays(int64_t dim, int64_t cols) {
    const int64_t steps = round_up(cols, lanes) / lanes * dim;  // products of vectors a sample
    return 4 * steps < 3 * cols * (round_up(dim, width) / lanes + 5);
  }

  // codes[s][0 .. held) = w[s] times C vectors of columns at m, for S samples.
  template <int64_t S, int64_t C>
  static void across(const T* const* w, int64_t dim, const T* m, int64_t apart, int64_t held, T* const* codes) {
    V sum[S][C];
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t c = 0; c < C; ++c) sum[s][c] = V{};
    }
    for (int64_t d = 0; d < dim; ++d) {
      V column[C];
      for (int64_t c = 0; c < C; ++c) column[c] = load(m + d * apart + c * lanes);
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t c = 0; c < C; ++c) sum[s][c] += w[s][d] * column[c];
      }
    }
#pragma GCC unroll 8
    for (int64_t s = 0; s < S; ++s) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < C; ++c) {
        if ((c + 1) * lanes <= held) {
          store<T>(sum[s][c], codes[s] + c * lanes);
        } else {
          store_first<T>(sum[s][c], codes[s] + c * lanes, held - c * lanes);
        }
      }
    }
  }

  // codes[s] [cols] = w[s] [dim] times columns at m, for n samples and at most `width` columns.
  static void reduce_across(const T* const* w, int64_t n, int64_t dim, const T* m, int64_t apart, int64_t cols,
                            T* const* codes) {
    constexpr int64_t rows = 2 * tile;
    for (int64_t c = 0; c < cols; c += 2 * lanes) {
      T* to[rows];
      const int64_t held = std::min(2 * lanes, cols - c);
      int64_t s = 0;
      const auto run = [&](auto samples) {
        constexpr int64_t S = decltype(samples)::value;
        for (; s + S <= n; s += S) {
          for (int64_t i = 0; i < S; ++i) to[i] = codes[s + i] + c;
          if (held > lanes) across<S, 2>(w + s, dim, m + c, apart, held, to);
          if (held <= lanes) across<S, 1>(w + s, dim, m + c, apart, held, to);
        }
      };
      run(std::integral_constant<int64_t, rows>());
      run(std::integral_constant<int64_t, 1>());
    }
  }

  // Rows of samples lie far apart, where the processor does not look ahead by itself.
  static void prefetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
  }

  // Whether rows of `dim` values in `bytes` from `out` on go past the caches to memory: they would not stay in any,
  // and the lines need not be read before they are written.
  static bool streams(const T* out, int64_t dim, int64_t bytes) {
    return bytes > (int64_t(24) << 20) && reinterpret_cast<uintptr_t>(out) % 64 == 0 && dim * sizeof(T) % 64 == 0;
  }

  // out[s] = base[s] + alpha * sum_j codes[s * stride + j] * column kept[j], for S samples and one panel; base may be
  // null. `past`: see streams.
  template <int64_t S, bool past = false>
  static void expand_panel(const T* codes, int64_t stride, int64_t count, const int64_t* kept, const T* panel,
                           const T* const* base, T alpha, T* const* out, int64_t d, int64_t dim) {
    V sum[S][vectors];
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t v = 0; v < vectors; ++v) sum[s][v] = V{};
    }
    for (int64_t j = 0; j < count; ++j) {
      V column[vectors];
      for (int64_t v = 0; v < vectors; ++v) column[v] = load(panel + kept[j] * width + v * lanes);
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t v = 0; v < vectors; ++v) sum[s][v] += codes[s * stride + j] * column[v];
      }
    }
    // unrolled, without an index into a vector: else the sums lie on the stack
#pragma GCC unroll 4
    for (int64_t s = 0; s < S; ++s) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = d + v * lanes;
        if (at + lanes <= dim) {
          const V all = base ? load(base[s] + at) + alpha * sum[s][v] : sum[s][v];
          past ? store_past_caches<T>(all, out[s] + at) : store<T>(all, out[s] + at);
        } else if (at < dim) {
          const V all = base ? load_first<T>(base[s] + at, dim - at) + alpha * sum[s][v] : sum[s][v];
          store_first<T>(all, out[s] + at, dim - at);
        }
      }
    }
  }

  // out [n, dim] from codes [n, count] over the columns `kept` of a packed matrix; base may be null. Rows `ahead` [n]
  // are fetched meanwhile: all of them from memory; of rows that a cache holds the beginning, the processor goes on.
  template <bool past = false>
  static void expand(const T* codes, int64_t n, int64_t count, const int64_t* kept, const T* panels, int64_t cols,
                     int64_t dim, const T* const* base, T alpha, T* const* out, const T* const* ahead,
                     int64_t n_ahead) {
    for (int64_t d = 0; d < dim; d += width) {
      const T* panel = panels + d * cols;
      const int64_t held = std::min(width, dim - d);
      for (int64_t s = 0; (past || d == 0) && s < n_ahead; ++s) prefetch(ahead[s] + d, held);
      int64_t s = 0;
      for (; s + tile <= n; s += tile) {
        expand_panel<tile, past>(codes + s * count, count, count, kept, panel, base ? base + s : nullptr, alpha,
                                 out + s, d, dim);
      }
      for (; s < n; ++s) {
        expand_panel<1, past>(codes + s * count, count, count, kept, panel, base ? base + s : nullptr, alpha, out + s,
                              d, dim);
      }
    }
  }

  // How many rows, a multiple of `lanes`, may be loaded from where they lie; the others need a copy.
  static int64_t whole_rows(const Matrix<T>& m) {
    const int64_t inside = m.end - m.data - round_up(m.cols, lanes);  // of the memory, before a row's last vector ends
    if (inside < 0) return 0;
    const int64_t rows = m.stride > 0 ? std::min(m.rows, inside / m.stride + 1) : m.rows;
    return rows / lanes * lanes;
  }

  // C vectors of reduce_once, read together so that rows pass by once.
  template <int64_t C>
  static void reduce_vectors(const T* w, const Matrix<T>& m, int64_t whole, int64_t c, Buffer<T>& copy, T* codes) {
    constexpr int64_t sums = C > 2 ? 2 : 4 / C;  // of a vector: the additions of one would wait for each other
    V sum[sums][C] = {};
    const T* at = m.data + c;
    for (int64_t d = 0; d < whole; d += lanes) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i, at += m.stride) {
        for (int64_t v = 0; v < C; ++v) sum[i % sums][v] += w[d + i] * load(at + v * lanes);
      }
    }
    for (int64_t d = whole; d < m.rows; d += lanes) {  // summed alike: where rows may be read changes no bit
      const Matrix<T> rows = rows_from(m, d, copy);
      for (int64_t i = 0; i < std::min(lanes, m.rows - d); ++i) {
        for (int64_t v = 0; v < C; ++v) {
          sum[i % sums][v] += w[d + i] * load(rows.data + i * rows.stride + c + v * lanes);
        }
      }
    }
    for (int64_t v = 0; v < C; ++v) {
      V all = sum[0][v];
      for (int64_t i = 1; i < sums; ++i) all += sum[i][v];
      store<T>(all, codes + c + v * lanes);
    }
  }

  // codes [cols, rounded up to whole vectors] = w [rows] times a matrix as it lies.
  static void reduce_once(const T* w, const Matrix<T>& m, Buffer<T>& copy, T* codes) {
    const int64_t whole = whole_rows(m), end = round_up(m.cols, lanes);
    int64_t c = 0;
    for (; c + 3 * lanes <= end; c += 3 * lanes) reduce_vectors<3>(w, m, whole, c, copy, codes);
    if (c + 2 * lanes <= end) reduce_vectors<2>(w, m, whole, c, copy, codes);
    if (c + 2 * lanes > end && c < end) reduce_vectors<1>(w, m, whole, c, copy, codes);
  }

  // Lane i: row i at m times codes [cols], the lanes in `used` only.
  static V expand_rows(const T* codes, const Lane* used, const T* m, int64_t stride, int64_t cols) {
    if (cols <= 0) return V{};
    V sum[lanes];
    const auto vectors_at = [&](int64_t c, auto first) {
      const V code = load(codes + c);
      Bits bits;
      std::memcpy(&bits, used + c, sizeof(bits));
      const T* at = m + c;
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i, at += stride) {
        const V product = code * only(load(at), bits);
        sum[i] = first.value ? product : sum[i] + product;
      }
    };
    vectors_at(0, std::true_type());  // sums that began with zeros would not stay in registers
    for (int64_t c = lanes; c < cols; c += lanes) vectors_at(c, std::false_type());
    return sum_of_each(sum);
  }

  // out [rows] = base + alpha * m codes, the lanes in `used` only; codes and used are rounded up to whole vectors.
  static void expand_once(const T* codes, const Lane* used, const Matrix<T>& m, Buffer<T>& copy, const T* base, T alpha,
                          T* out) {
    const int64_t whole = whole_rows(m);
    for (int64_t d = 0; d < whole; d += lanes) {
      const V sums = expand_rows(codes, used, m.data + d * m.stride, m.stride, m.cols);
      store<T>(base ? load(base + d) + alpha * sums : sums, out + d);
    }
    for (int64_t d = whole; d < m.rows; d += lanes) {
      const Matrix<T> rows = rows_from(m, d, copy);
      const V sums = expand_rows(codes, used, rows.data, rows.stride, m.cols);
      const int64_t held = std::min(lanes, m.rows - d);
      store_first<T>(base ? load_first<T>(base + d, held) + alpha * sums : sums, out + d, held);
    }
  }
};

}  // namespace
}  // namespace sage_fast::SAGE_ISA
