#include "../upfirdn2d.h"
#include "channel_strips.inl"

// Columns first, then rows, some rows at a time: the sums along the columns (`mid`) stay in the first-level cache.
// Along a column, neighbours are whole rows, whatever the layout; along a row they lie `inner` values apart. So nearly
// everything is one loop, weighted_sum; only rows of single values (inner = 1) that change their length need shuffles.
namespace sage_fast::SAGE_ISA {
namespace {

constexpr int64_t kPacked = 256 << 10;  // bytes of the second-level cache for planes side by side

// The taps that meet one output: taps first, first + up, ... on pixels at, at + 1, ...; count of them.
struct Meeting {
  int64_t first, at, count;
};

Meeting meeting(int64_t out, int64_t up, int64_t down, int64_t before, int64_t taps, int64_t size) {
  const int64_t from = out * down - before, at = std::max<int64_t>(0, ceil_div(from, up)), first = at * up - from;
  return {first, at, std::max<int64_t>(0, std::min(ceil_div(taps - first, up), size - at))};
}

// out[i] (+)= sum_k taps[k * tap_step] * in[i + k * step]; the sums stay in registers. Count > 0 is known to the
// compiler, which then keeps the taps in registers too (they are copied first: out might be where they are, for all it
// knows).
template <int64_t Count, class A, class In, class Out>
inline void weighted_sum_of(const In* in, int64_t step, const A* taps, int64_t tap_step, int64_t dynamic, bool add,
                            Out* out, int64_t n) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t count = Count > 0 ? Count : dynamic;
  A t[Count > 0 ? Count : 32];
  for (int64_t k = 0; k < count; ++k) t[k] = taps[k * tap_step];
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    typename Vector<A>::type a = {}, b = {};
    if (add) a = load_as<A>(out + i), b = load_as<A>(out + i + lanes);
    for (int64_t k = 0; k < count; ++k) {
      a += t[k] * load_as<A>(in + i + k * step);
      b += t[k] * load_as<A>(in + i + lanes + k * step);
    }
    store_as<A>(a, out + i);
    store_as<A>(b, out + i + lanes);
  }
  if (i + lanes <= n) {
    typename Vector<A>::type sum = {};
    if (add) sum = load_as<A>(out + i);
    for (int64_t k = 0; k < count; ++k) sum += t[k] * load_as<A>(in + i + k * step);
    store_as<A>(sum, out + i);
    i += lanes;
  }
  if (const int64_t rest = n - i; rest > 0) {
    typename Vector<A>::type sum = {};
    if (add) sum = load_first<A>(out + i, rest);
    for (int64_t k = 0; k < count; ++k) sum += t[k] * load_first<A>(in + i + k * step, rest);
    store_first<A>(sum, out + i, rest);
  }
}

template <class A, class In, class Out>
inline void weighted_sum(const In* in, int64_t step, const A* taps, int64_t tap_step, int64_t count, bool add, Out* out,
                         int64_t n) {
  if (count == 4) return weighted_sum_of<4>(in, step, taps, tap_step, count, add, out, n);
  if (count == 2) return weighted_sum_of<2>(in, step, taps, tap_step, count, add, out, n);
  if (count == 1) return weighted_sum_of<1>(in, step, taps, tap_step, count, add, out, n);
  weighted_sum_of<0>(in, step, taps, tap_step, count, add, out, n);
}

template <class V, int... I>
inline V evens(V a, V b, std::integer_sequence<int, I...>) {
  return lanes_of<(2 * I)...>(a, b);
}
template <class V, int... I>
inline V odds(V a, V b, std::integer_sequence<int, I...>) {
  return lanes_of<(2 * I + 1)...>(a, b);
}
template <class V, int... I>  // a0 b0 a1 b1 ..., the lower or the upper half
inline V zipped_low(V a, V b, std::integer_sequence<int, I...>) {
  return lanes_of<(I / 2 + I % 2 * int(sizeof...(I)))...>(a, b);
}
template <class V, int... I>
inline V zipped_high(V a, V b, std::integer_sequence<int, I...>) {
  return lanes_of<(int(sizeof...(I)) / 2 + I / 2 + I % 2 * int(sizeof...(I)))...>(a, b);
}

template <class A, class Out>
inline void put(typename Vector<A>::type v, bool add, Out* out, int64_t rest) {
  constexpr int64_t lanes = Vector<A>::lanes;
  if (rest >= lanes) {
    store_as<A>(add ? v + load_as<A>(out) : v, out);
  } else if (rest > 0) {
    store_first<A>(add ? v + load_first<A>(out, rest) : v, out, rest);
  }
}

// out[i] (+)= sum_j taps[j] * in[2 i + j]; reads up to 2 vectors beyond the last pixel that counts.
template <int64_t Count, class A, class Out>
void halve_row(const A* in, const A* taps, int64_t dynamic, bool add, Out* out, int64_t n) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr std::make_integer_sequence<int, lanes> lane;
  const int64_t count = Count > 0 ? Count : dynamic;
  A t[Count > 0 ? Count : 32];
  for (int64_t j = 0; j < count; ++j) t[j] = taps[j];
  for (int64_t i = 0; i < n; i += lanes) {
    typename Vector<A>::type sum = {};
    for (int64_t j = 0; j < count; j += 2) {
      const auto a = load<A>(in + 2 * i + j), b = load<A>(in + 2 * i + j + lanes);
      sum += t[j] * evens(a, b, lane);
      if (j + 1 < count) sum += t[j + 1] * odds(a, b, lane);
    }
    put<A>(sum, add, out + i, n - i);
  }
}

// Outputs 2 i and 2 i + 1 take every second tap each, from their first tap on, from pixel in[i + at] on.
template <int64_t Count, class A, class Out>
void double_row(const A* in, const A* taps, const Meeting (&phase)[2], bool add, Out* out, int64_t n) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr std::make_integer_sequence<int, lanes> lane;
  const int64_t counts[2] = {Count > 0 ? Count : phase[0].count, Count > 0 ? Count : phase[1].count};
  A t[2][Count > 0 ? Count : 16];
  for (int64_t p = 0; p < 2; ++p) {
    for (int64_t k = 0; k < counts[p]; ++k) t[p][k] = taps[phase[p].first + 2 * k];
  }
  for (int64_t i = 0; 2 * i < n; i += lanes) {
    typename Vector<A>::type sum[2] = {};
    for (int64_t p = 0; p < 2; ++p) {
      for (int64_t k = 0; k < counts[p]; ++k) {
        sum[p] += t[p][k] * load<A>(in + i + phase[p].at + k);
      }
    }
    put<A>(zipped_low(sum[0], sum[1], lane), add, out + 2 * i, n - 2 * i);
    put<A>(zipped_high(sum[0], sum[1], lane), add, out + 2 * i + lanes, n - 2 * i - lanes);
  }
}

// col x row = f to within `tolerance` of its largest tap, when f has rank one (every filter that StyleGAN2 uses); false
// otherwise.
bool separate(const double* f, int64_t kh, int64_t kw, double tolerance, double* col, double* row) {
  int64_t pivot = 0;
  double largest = 0;
  for (int64_t i = 0; i < kh * kw; ++i) {
    if (std::abs(f[i]) > largest) largest = std::abs(f[pivot = i]);
  }
  if (!(largest > 0) || std::isinf(largest)) return false;
  for (int64_t i = 0; i < kh; ++i) col[i] = f[i * kw + pivot % kw] / f[pivot];
  for (int64_t j = 0; j < kw; ++j) row[j] = f[(pivot / kw) * kw + j];
  for (int64_t i = 0; i < kh * kw; ++i) {
    if (!(std::abs(f[i] - col[i / kw] * row[i % kw]) <= tolerance * largest)) return false;
  }
  return true;
}

// The filter as a sum of terms, column taps x row taps: one when it has rank one, else one for each of its rows.
template <class A>
struct Terms {
  int64_t count = 1;
  A col[32], row[32 * 32];  // row [count, kw]

  Terms(const double* filter, const UpfirdnParams& p, double epsilon) {
    const int64_t n = p.kh * p.kw;
    double f[32 * 32], c[32], r[32];
    for (int64_t i = 0; i < n; ++i) f[i] = filter[p.flip ? i : n - 1 - i] * p.gain;  // correlation taps
    if (separate(f, p.kh, p.kw, 4 * epsilon, c, r)) {  // an outer product, rounded to A, passes
      for (int64_t i = 0; i < p.kh; ++i) col[i] = A(c[i]);
      for (int64_t i = 0; i < p.kw; ++i) row[i] = A(r[i]);
      return;
    }
    count = p.kh;
    for (int64_t i = 0; i < p.kh; ++i) col[i] = A(1);
    for (int64_t i = 0; i < n; ++i) row[i] = A(f[i]);
  }

  // what of the meeting of an output row takes part in term t
  Meeting part(Meeting m, int64_t t, int64_t up) const {
    if (count == 1) return m;
    const int64_t taps = t - m.first;
    return taps >= 0 && taps % up == 0 && taps / up < m.count ? Meeting{t, m.at + taps / up, 1} : Meeting{t, 0, 0};
  }
};

// Filters rows along themselves: output columns begin to end from `mid`, pixels a and on of that row with zeros beyond
// the image. Made once per tile.
template <class A>
class RowFilter {
 public:
  RowFilter(const UpfirdnParams& p, const Meeting* meetings, int64_t width)
      : p_(p), meetings_(meetings), few_(p.inner > 1 && p.inner < 16 && p.up == 2 && p.down == 1) {
    if (!few_) return;
    for (auto& half : halves_) half.assign((width / 2 + 1) * p.inner + Vector<A>::lanes);
    line_.assign(2 * halves_[0].size());
  }

  void move_to(int64_t begin, int64_t end, int64_t a) {
    begin_ = begin, end_ = end, a_ = a;
    for (int64_t i = 0; p_.up == 2 && i < 2; ++i) {  // outputs begin + i, begin + i + 2, ...
      const int64_t from = begin + i - p_.left, at = ceil_div(from, 2), first = at * 2 - from;
      phase_[i] = {first, at - a, first < p_.kw ? ceil_div(p_.kw - first, 2) : 0};
    }
  }

  template <class Out>
  void operator()(const A* mid, const A* taps, bool add, Out* out) {
    const int64_t n = end_ - begin_, inner = p_.inner;
    if (p_.up == 1 && p_.down == 1) return weighted_sum(mid, inner, taps, 1, p_.kw, add, out, n * inner);
    if (inner == 1 && p_.up == 1 && p_.down == 2) {
      return p_.kw == 4 ? halve_row<4>(mid, taps, 4, add, out, n) : halve_row<0>(mid, taps, p_.kw, add, out, n);
    }
    if (inner == 1 && p_.up == 2 && p_.down == 1) {
      return p_.kw == 4 ? double_row<2>(mid, taps, phase_, add, out, n) : double_row<0>(mid, taps, phase_, add, out, n);
    }
    if (few_) return double_few(mid, taps, add, out, n);
    for (int64_t o = begin_; o < end_; ++o, out += inner) {
      const Meeting& m = meetings_[o];
      weighted_sum(mid + (m.at - a_) * inner, inner, taps + m.first, p_.up, m.count, add, out, inner);
    }
  }

 private:
  // Pixels of few values, RGB say: all even outputs in one sum, all odd ones in another, then pixel by pixel together.
  template <class Out>
  void double_few(const A* mid, const A* taps, bool add, Out* out, int64_t n) {
    const int64_t inner = p_.inner, half = (n + 1) / 2;
    for (int64_t i = 0; i < 2; ++i) {
      weighted_sum(mid + phase_[i].at * inner, inner, taps + phase_[i].first, 2, phase_[i].count, false,
                   halves_[i].data(), (i == 0 ? half : n / 2) * inner);
    }
    const A *even = halves_[0].data(), *odd = halves_[1].data();
    A* line = line_.data();
    for (int64_t i = 0; i < half; ++i, even += inner, odd += inner, line += 2 * inner) {
      for (int64_t c = 0; c < inner; ++c) line[c] = even[c], line[inner + c] = odd[c];
    }
    const A one = 1;
    weighted_sum(line_.data(), 0, &one, 0, 1, add, out, n * inner);
  }

  const UpfirdnParams& p_;
  const Meeting* meetings_;
  const bool few_;
  int64_t begin_ = 0, end_ = 0, a_ = 0;
  Meeting phase_[2] = {};
  Buffer<A> halves_[2], line_;
};

// Filters bands of rows of one plane after another; a thread has its own.
template <class T>
class PlaneFilter {
  typedef typename Accumulator<T>::type A;

 public:
  const UpfirdnParams p;
  const int64_t out_h, out_w, band;  // rows that are filtered at a time

  PlaneFilter(const UpfirdnParams& params, const Terms<A>& terms)
      : p(params),
        out_h(p.out_h()),
        out_w(p.out_w()),
        // a tile of mid: about 16 KiB of rows, cut where one row is longer than 64 KiB
        band(std::min(out_h, std::clamp<int64_t>(16384 / int64_t(sizeof(A)) / row_size_of(p), 1, 32))),
        terms_(terms),
        width_(width_of(p)),
        row_size_(row_size_of(p)),
        columns_(out_w),
        rows_(out_h),
        mid_(band * row_size_ + 4 * Vector<A>::lanes),
        sums_(terms.count > 1 ? width_ * p.inner : 0),
        along_row_(p, columns_.data(), width_) {
    // made once: divisions cost more than the sums of a short row
    for (int64_t o = 0; o < out_w; ++o) columns_[o] = meeting(o, p.up, p.down, p.left, p.kw, p.w);
    for (int64_t o = 0; o < out_h; ++o) rows_[o] = meeting(o, p.up, p.down, p.top, p.kh, p.h);
  }

  // Output rows from `top` on, a band of them, of the plane `in`.
  void operator()(const T* in, int64_t top, T* out) {
    for (int64_t begin = 0; begin < out_w; begin += width_) tile(in, top, begin, std::min(begin + width_, out_w), out);
  }

 private:
  static int64_t width_of(const UpfirdnParams& p) {  // output columns
    return std::min(p.out_w(), std::max<int64_t>(8, 65536 / int64_t(sizeof(A)) / p.inner * p.up / p.down));
  }
  static int64_t row_size_of(const UpfirdnParams& p) {  // values of x that they need
    return ((width_of(p) * p.down + p.kw) / p.up + 2) * p.inner;
  }

  void tile(const T* in, int64_t top, int64_t begin, int64_t end, T* out) {
    const int64_t inner = p.inner, rows = std::min(band, out_h - top);
    const int64_t a = ceil_div(begin * p.down - p.left, p.up);  // pixels a to b of x are needed, some beyond the edges
    const int64_t b = std::max(a, floor_div((end - 1) * p.down - p.left + p.kw - 1, p.up) + 1);
    const int64_t inside_a = std::clamp<int64_t>(a, 0, p.w), inside_b = std::clamp<int64_t>(b, inside_a, p.w);
    const int64_t before = std::clamp<int64_t>(inside_a - a, 0, b - a) * inner, n = (inside_b - inside_a) * inner;
    along_row_.move_to(begin, end, a);
    A* const mid = mid_.data();
    for (int64_t i = 0; i < (terms_.count == 1 ? rows : 1); ++i) {  // zeros around what is inside
      A* const row = mid + i * row_size_;
      std::fill(row, row + before, A(0));
      std::fill(row + before + n, row + row_size_, A(0));
    }
    const auto along_columns = [&](int64_t o, int64_t term, A* to) {
      const Meeting m = terms_.part(rows_[o], term, p.up);
      weighted_sum(in + (m.at * p.w + inside_a) * inner, p.w * inner, terms_.col + m.first, p.up, m.count, false,
                   to + before, n);
    };
    const auto place = [&](int64_t o) { return out + (o * out_w + begin) * inner; };
    if (terms_.count == 1) {  // one after the other: what was just written in short pieces is slow to read in others
      for (int64_t i = 0; i < rows; ++i) along_columns(top + i, 0, mid + i * row_size_);
      for (int64_t i = 0; i < rows; ++i) along_row_(mid + i * row_size_, terms_.row, false, place(top + i));
      return;
    }
    for (int64_t o = top; o < top + rows; ++o) {
      for (int64_t term = 0; term < terms_.count; ++term) {
        along_columns(o, term, mid);
        along_row_(mid, terms_.row + term * p.kw, term > 0, sums_.data());
      }
      const A one = 1;
      weighted_sum(sums_.data(), 0, &one, 0, 1, false, place(o), (end - begin) * inner);
    }
  }

  const Terms<A>& terms_;
  const int64_t width_, row_size_;
  Buffer<Meeting> columns_, rows_;
  Buffer<A> mid_, sums_;
  RowFilter<A> along_row_;
};

// The square of lanes x lanes values in v, transposed: zipping its halves together log2(lanes) times.
template <class A>
inline void transpose(typename Vector<A>::type (&v)[Vector<A>::lanes]) {
  constexpr int64_t lanes = Vector<A>::lanes;
  constexpr std::make_integer_sequence<int, lanes> lane;
  for (int64_t step = 1; step < lanes; step *= 2) {
    typename Vector<A>::type next[lanes];
    for (int64_t i = 0; i < lanes / 2; ++i) {
      next[2 * i] = zipped_low(v[i], v[i + lanes / 2], lane);
      next[2 * i + 1] = zipped_high(v[i], v[i + lanes / 2], lane);
    }
    for (int64_t i = 0; i < lanes; ++i) v[i] = next[i];
  }
}

// Small planes, as many as a vector has lanes, side by side: [count, size] <-> [size, lanes]. Short rows would leave
// most lanes empty; this fills them all.
template <class A, class T>
void pack(const T* planes, int64_t count, int64_t size, A* packed) {
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t i = 0; i < size; i += lanes) {
    const int64_t n = std::min(lanes, size - i);
    typename Vector<A>::type v[lanes] = {};
    for (int64_t k = 0; k < count; ++k) {
      v[k] = n == lanes ? load_as<A>(planes + k * size + i) : load_first<A>(planes + k * size + i, n);
    }
    transpose<A>(v);
    for (int64_t k = 0; k < n; ++k) store<A>(v[k], packed + (i + k) * lanes);
  }
}

template <class A, class T>
void unpack(const A* packed, int64_t count, int64_t size, T* planes) {
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t i = 0; i < size; i += lanes) {
    const int64_t n = std::min(lanes, size - i);
    typename Vector<A>::type v[lanes] = {};
    for (int64_t k = 0; k < n; ++k) v[k] = load(packed + (i + k) * lanes);
    transpose<A>(v);
    for (int64_t k = 0; k < count; ++k) put<A>(v[k], false, planes + k * size + i, n);
  }
}

template <class T>
void run(const T* x, const double* filter, const UpfirdnParams& p, T* y) {
  typedef typename Accumulator<T>::type A;
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t size = p.h * p.w * p.inner, out_h = p.out_h(), out_size = out_h * p.out_w() * p.inner;
  const Terms<A> terms(filter, p, std::numeric_limits<A>::epsilon());
  const bool short_rows = p.down == 1 || p.w < 2 * lanes;  // halving longer ones takes less than packing them
  if (p.inner == 1 && p.planes > lanes / 4 && short_rows && (size + out_size) * lanes * int64_t(sizeof(A)) <= kPacked) {
    UpfirdnParams packed = p;
    packed.planes = 1, packed.inner = lanes;
    parallel(ceil_div(p.planes, lanes), 1 + 16384 / (out_size * lanes + 1), [&](int64_t first, int64_t last) {
      PlaneFilter<A> filter_plane(packed, terms);
      Buffer<A> in(size * lanes), out(out_size * lanes);
      for (int64_t plane = first * lanes; plane < std::min(last * lanes, p.planes); plane += lanes) {
        const int64_t count = std::min(lanes, p.planes - plane);
        pack(x + plane * size, count, size, in.data());
        for (int64_t top = 0; top < out_h; top += filter_plane.band) filter_plane(in.data(), top, out.data());
        unpack(out.data(), count, out_size, y + plane * out_size);
      }
    });
    return;
  }
  if (terms.count == 1 && strips_are_ahead<T>(p)) {
    return p.down == 1 ? filter_strips<1>(x, p, terms.col, terms.row, y)
                       : filter_strips<2>(x, p, terms.col, terms.row, y);
  }
  const int64_t band = PlaneFilter<T>(p, terms).band, bands = ceil_div(out_h, band);
  parallel(p.planes * bands, 1 + 16384 / (band * out_size / out_h + 1), [&](int64_t first, int64_t last) {
    PlaneFilter<T> filter_plane(p, terms);
    for (int64_t job = first; job < last; ++job) {
      filter_plane(x + job / bands * size, job % bands * band, y + job / bands * out_size);
    }
  });
}

}  // namespace

// x [planes, h, w, inner], f [kh, kw] -> y [planes, out_h, out_w, inner], both of dtype
void upfirdn2d(const void* x, const double* filter, const UpfirdnParams& p, Dtype dtype, void* y) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    run(static_cast<const T*>(x), filter, p, static_cast<T*>(y));
  });
}

}  // namespace sage_fast::SAGE_ISA
