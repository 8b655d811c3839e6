#include "../least_squares_codes.h"
#include "layer_products.inl"

namespace sage_fast::SAGE_ISA {

namespace {

// Many samples: the layer's rows are laid out once a task, and lanes lie across them.
template <class T>
void codes_across(const T* w, const T* pinv, const CodesParams& p, T* out) {
  using P = Products<T>;
  constexpr int64_t run = 8 * P::group;  // samples of a task
  const T* end = pinv + (p.layers - 1) * p.pinv_layer + (p.k - 1) * p.pinv_row + p.dim;
  const int64_t runs = (p.n + run - 1) / run;
  const int64_t work = 1 + std::min(p.n, run) * p.dim * p.k / P::lanes;  // steps a task
  parallel(p.layers * runs, 1 + 20000 / work, [=](int64_t begin, int64_t end_task) {
    Scratch<T> panels(P::panels_size(p.k, p.dim));  // [panels of columns, dim, width]
    int64_t held = -1;                              // the layer in panels
    for (int64_t task = begin; task < end_task; ++task) {
      const int64_t layer = task / runs, first = task % runs * run, last = std::min(first + run, p.n);
      if (layer != held) P::pack({pinv + layer * p.pinv_layer, p.k, p.dim, p.pinv_row, end}, panels.data(), P::lanes);
      held = layer;
      for (int64_t i = first; i < last; i += P::group) {
        const int64_t n = std::min(P::group, last - i);
        const T* in[P::group];
        T* to[P::group];
        for (int64_t s = 0; s < n; ++s) {
          in[s] = w + (i + s) * p.w_row + layer * p.w_layer;
          to[s] = out + ((i + s) * p.layers + layer) * p.k;
        }
        for (int64_t s = i + P::group; s < std::min(i + 2 * P::group, p.n); ++s) {
          P::prefetch(w + s * p.w_row + layer * p.w_layer, p.dim);
        }
        for (int64_t c = 0; c < p.k; c += P::width) {
          P::reduce_across(in, n, p.dim, panels.data() + c * p.dim, P::width, std::min(P::width, p.k - c), to);
          for (int64_t s = 0; s < n; ++s) to[s] += P::width;
        }
      }
    }
  });
}

}  // namespace

// w [n, layers, dim], pinv [layers, k, dim] -> out [n, layers, k]. A task takes one layer and a run of samples, and of
// the layer's rows a few at a time: they stay in the L1 cache for the run. Rows of whole panels are read as they lie,
// others from a copy that ends in zeros. How a value is summed does not depend on the tasks.
template <class T>
void least_squares_codes(const T* w, const T* pinv, const CodesParams& p, T* out) {
  using P = Products<T>;
  if (P::across_pays(p.dim, p.k)) return codes_across(w, pinv, p, out);
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
        const int64_t part = piece * p.dim / pieces;  // of the next run's rows, so that memory is always as busy
        for (int64_t i = first; i < end; i += P::group) {
          const int64_t n = std::min(P::group, end - i);
          const T* in[P::group];
          for (int64_t s = 0; s < n; ++s) in[s] = w + (i + s) * p.w_row + layer * p.w_layer;
          for (int64_t s = i + run; s < std::min(i + run + n, p.n); ++s) {
            P::prefetch(w + s * p.w_row + layer * p.w_layer + part, p.dim / pieces + 1);
            __builtin_prefetch(out + (s * p.layers + layer) * p.k + from, 1);
          }
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
