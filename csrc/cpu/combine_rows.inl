#include "../combine_rows.h"
#include "layer_products.inl"

namespace sage_fast::SAGE_ISA {

// out [n, k] = weights [n, m] times (table - centre)[rows [m], columns [k]]. The part of the table that is used is
// packed piece by piece, into the L2 cache: it is never copied as a whole. How a value is summed depends on m alone.
template <class T>
void combine_rows(const T* weights, const T* table, const T* centre, const int64_t* rows, const int64_t* columns,
                  const CombineParams& p, T* out) {
  using P = Products<T>;
  constexpr int64_t block = 512, lookahead = 8;  // rows
  const int64_t panels = (p.columns + P::width - 1) / P::width;
  parallel(panels, 1, [=](int64_t begin, int64_t end) {
    Scratch<T> packed(block * P::width);
    Buffer<int64_t> all(block);
    for (int64_t j = 0; j < block; ++j) all[j] = j;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * P::width, held = std::min(P::width, p.columns - first);
      int64_t column[P::width];  // of the panel; what stands beyond the last one is not stored
      T middle[P::width];
      for (int64_t c = 0; c < P::width; ++c) {
        column[c] = columns[first + std::min(c, held - 1)];
        middle[c] = centre[column[c]];
      }
      for (int64_t m = 0; m < p.m; m += block) {
        const int64_t count = std::min(block, p.m - m);
        for (int64_t j = 0; j < count; ++j) {
          const T* from = table + rows[m + j] * p.table_row;
          if (m + j + lookahead < p.m) {
            const T* later = table + rows[m + j + lookahead] * p.table_row;
            for (int64_t c = 0; c < P::width; c += 8) __builtin_prefetch(later + column[c]);
          }
          T* to = packed.data() + j * P::width;
          for (int64_t c = 0; c < P::width; ++c) to[c] = from[column[c]] - middle[c];
        }
        int64_t i = 0;
        const auto run = [&](auto samples) {
          constexpr int64_t S = decltype(samples)::value;
          for (; i + S <= p.n; i += S) {
            T* to[S];
            for (int64_t s = 0; s < S; ++s) to[s] = out + (i + s) * p.columns;
            P::template expand_panel<S>(weights + i * p.weight_row + m, p.weight_row, count, all.data(), packed.data(),
                                        m ? to : nullptr, T(1), to, first, p.columns);
          }
        };
        run(std::integral_constant<int64_t, P::tile>());
        run(std::integral_constant<int64_t, 1>());
      }
    }
  });
}

template void combine_rows(const float*, const float*, const float*, const int64_t*, const int64_t*,
                           const CombineParams&, float*);
template void combine_rows(const double*, const double*, const double*, const int64_t*, const int64_t*,
                           const CombineParams&, double*);

}  // namespace sage_fast::SAGE_ISA
