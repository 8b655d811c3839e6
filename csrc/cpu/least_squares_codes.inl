#include "../least_squares_codes.h"
#include "layer_products.inl"

namespace sage_fast::SAGE_ISA {

// w [n, layers, dim], pinv [layers, k, dim] -> out [n, layers, k]. A task takes one layer and a run of samples, and of
// the layer's rows a few at a time: they stay in the L1 cache for the run. Rows of whole panels are read as they lie,
// others from a copy that ends in zeros. How a value is summed does not depend on the tasks.
template <class T>
void least_squares_codes(const T* w, const T* pinv, const CodesParams& p, T* out) {
  using P = Products<T>;
  constexpr int64_t run = 8 * P::group;  // samples of a task
  const int64_t padded = round_up(p.dim, P::width), runs = (p.n + run - 1) / run;
  const int64_t most = std::clamp<int64_t>(20480 / sizeof(T) / padded, P::columns, 32);  // rows at a time
  const int64_t pieces = (p.k + most - 1) / most;
  const bool copied = padded != p.dim;
  const int64_t work = 1 + std::min(p.n, run) * p.dim * p.k / P::lanes;  // steps a task
  parallel(p.layers * runs, 1 + 20000 / work, [=](int64_t begin, int64_t end_task) {
    Scratch<T> copy(copied ? p.k * padded : 0), sums(P::sums_size(most)), codes(P::codes_size(most));
    int64_t held = -1;  // the layer in copy
    for (int64_t task = begin; task < end_task; ++task) {
      const int64_t layer = task / runs, first = task % runs * run, end = std::min(first + run, p.n);
      const T* rows = pinv + layer * p.pinv_layer;
      for (int64_t c = 0; copied && layer != held && c < p.k; ++c) {
        T* to = copy.data() + c * padded;
        std::copy_n(rows + c * p.pinv_row, p.dim, to);
        for (int64_t d = p.dim; d < padded; ++d) to[d] = 0;
      }
      held = layer;
      const typename P::Columns all = {copied ? copy.data() : rows, p.k, copied ? padded : p.pinv_row, P::width};
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = piece * p.k / pieces, count = (piece + 1) * p.k / pieces - from;
        for (int64_t i = first; i < end; i += P::group) {
          const int64_t n = std::min(P::group, end - i);
          const T* in[P::group];
          for (int64_t s = 0; s < n; ++s) in[s] = w + (i + s) * p.w_row + layer * p.w_layer;
          P::reduce(in, n, p.dim, all.from(from, count), sums, codes.data());
          for (int64_t s = 0; s < n; ++s) {
            const T* code = codes.data() + s * count;
            T* to = out + ((i + s) * p.layers + layer) * p.k + from;
            int64_t j = 0;
            for (; j + P::lanes <= count; j += P::lanes) store<T>(load(code + j), to + j);
            if (j < count) store_first<T>(load(code + j), to + j, count - j);
          }
        }
      }
    }
  });
}

template void least_squares_codes(const float*, const float*, const CodesParams&, float*);
template void least_squares_codes(const double*, const double*, const CodesParams&, double*);

}  // namespace sage_fast::SAGE_ISA
