#include "../upfirdn2d.h"

// Columns first, then rows, some rows at a time: the sums along the columns (`mid`) stay in the first-level cache. Along a
// column, neighbours are whole rows, whatever the layout; along a row they lie `inner` values apart. So nearly everything
// is one loop, weighted_sum; only rows of single values (inner = 1) that change their length need shuffles.
namespace sage_fast::SAGE_ISA {
namespace {

// The taps that meet one output: taps first, first + up, ... on pixels at, at + 1, ...; count of them.
struct Meeting {
  int64_t first, at, count;
};

Meeting meeting(int64_t out, int64_t up, int64_t down, int64_t before, int64_t taps, int64_t size) {
  const int64_t from = out * down - before, at = std::max<int64_t>(0, ceil_div(from, up)), first = at * up - from;
  return {first, at, std::max<int64_t>(0, std::min(ceil_div(taps - first, up), size - at))};
}

// out[i] (+)= sum_k taps[k * tap_step] * in[i + k * step]; the sums stay in registers. Count > 0 is known to the compiler,
// which then keeps the taps in registers too (they are copied first: out might be where they are, for all it knows).
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
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, int... I>
inline V odds(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <class V, int... I>  // a0 b0 a1 b1 ..., the lower or the upper half
inline V zipped_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * int(sizeof...(I)))...);
}
template <class V, int... I>
inline V zipped_high(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (int(sizeof...(I)) / 2 + I / 2 + I % 2 * int(sizeof...(I)))...);
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

template <class T>
void run(const T* x, const double* filter, const UpfirdnParams& p, T* y) {
  typedef typename Accumulator<T>::type A;
  const int64_t out_h = p.out_h(), out_w = p.out_w(), inner = p.inner;
  const Terms<A> terms(filter, p, std::numeric_limits<A>::epsilon());
  Buffer<Meeting> columns(out_w), meetings(out_h);  // made once: divisions cost more than the sums of a short row
  for (int64_t o = 0; o < out_w; ++o) columns[o] = meeting(o, p.up, p.down, p.left, p.kw, p.w);
  for (int64_t o = 0; o < out_h; ++o) meetings[o] = meeting(o, p.up, p.down, p.top, p.kh, p.h);

  // a tile of mid: about 16 KiB of rows, cut where one row is longer than 64 KiB
  const int64_t width = std::min(out_w, std::max<int64_t>(8, 65536 / int64_t(sizeof(A)) / inner * p.up / p.down));
  const int64_t reach = (width * p.down + p.kw) / p.up + 2;  // pixels of x that `width` outputs need
  const int64_t row_size = reach * inner, slack = 4 * Vector<A>::lanes;
  const int64_t band = std::min(out_h, std::clamp<int64_t>(16384 / int64_t(sizeof(A)) / row_size, 1, 32));
  const int64_t bands = ceil_div(out_h, band);

  parallel(p.planes * bands, 1 + 16384 / (band * out_w * inner + 1), [&](int64_t first, int64_t last) {
    Buffer<A> buffer(band * row_size + slack), sums(terms.count > 1 ? width * inner : 0);
    A* const mid = buffer.data();
    RowFilter<A> along_row(p, columns.data(), width);
    for (int64_t job = first; job < last; ++job) {
      const T* in = x + job / bands * p.h * p.w * inner;
      T* out = y + job / bands * out_h * out_w * inner;
      const int64_t top = job % bands * band, rows = std::min(band, out_h - top);
      for (int64_t begin = 0; begin < out_w; begin += width) {
        const int64_t end = std::min(begin + width, out_w);
        const int64_t a = ceil_div(begin * p.down - p.left, p.up);
        const int64_t b = std::max(a, floor_div((end - 1) * p.down - p.left + p.kw - 1, p.up) + 1);
        const int64_t inside_a = std::clamp<int64_t>(a, 0, p.w), inside_b = std::clamp<int64_t>(b, inside_a, p.w);
        const int64_t before = std::min(inside_a - a, b - a) * inner, n = (inside_b - inside_a) * inner;
        along_row.move_to(begin, end, a);
        const auto columns_of = [&](int64_t i, int64_t t, A* to) {  // the sums along the columns for output row i
          const Meeting m = terms.part(meetings[i], t, p.up);
          weighted_sum(in + (m.at * p.w + inside_a) * inner, p.w * inner, terms.col + m.first, p.up, m.count, false,
                       to + before, n);
        };
        const auto clear_borders = [&](A* row) {
          for (int64_t i = 0; i < before; ++i) row[i] = A(0);
          for (int64_t i = before + n; i < row_size; ++i) row[i] = A(0);
        };
        if (terms.count == 1) {
          for (int64_t i = 0; i < rows; ++i) {
            clear_borders(mid + i * row_size);
            columns_of(top + i, 0, mid + i * row_size);
          }
          for (int64_t i = 0; i < rows; ++i) {
            along_row(mid + i * row_size, terms.row, false, out + ((top + i) * out_w + begin) * inner);
          }
          continue;
        }
        clear_borders(mid);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t t = 0; t < terms.count; ++t) {
            columns_of(top + i, t, mid);
            along_row(mid, terms.row + t * p.kw, t > 0, sums.data());
          }
          const A one = 1;
          weighted_sum(sums.data(), 0, &one, 0, 1, false, out + ((top + i) * out_w + begin) * inner,
                       (end - begin) * inner);
        }
      }
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
