#include "../project_onto_basis.h"
#include "layer_products.inl"

namespace sage_fast::SAGE_ISA {

// w [n, layers, dim], basis [layers, dim, rank] -> out [n, layers, dim]. A task takes one layer and a run of samples:
// the layer's basis stays in its cache. How a value is summed does not depend on the tasks.
template <class T>
void project_onto_basis(const T* w, const T* basis, const ProjectParams& p, T* out) {
  using P = Products<T>;
  const T* end = basis + (p.layers - 1) * p.basis_layer + (p.dim - 1) * p.basis_row + p.rank;
  const auto layer_basis = [=](int64_t layer) {
    return Matrix<T>{basis + layer * p.basis_layer, p.dim, p.rank, p.basis_row, end};
  };
  const int64_t work = 1 + p.dim * p.rank / P::lanes;  // steps a sample and product
  if (p.n == 1) {
    parallel(p.layers, 1 + 20000 / work, [=](int64_t begin, int64_t end_layer) {
      const int64_t padded = round_up(p.rank, P::lanes);
      Buffer<T> codes(padded), copy;
      Buffer<typename P::Lane> used(padded);
      for (int64_t r = 0; r < p.rank; ++r) used[r] = -1;
      for (int64_t layer = begin; layer < end_layer; ++layer) {
        P::reduce_once(w + layer * p.w_layer, layer_basis(layer), copy, codes.data());
        for (int64_t r = p.rank; r < padded; ++r) codes[r] = 0;
        P::expand_once(codes.data(), used.data(), layer_basis(layer), copy, nullptr, T(1), out + layer * p.dim);
      }
    });
    return;
  }
  // Samples of a run go through one layer after the other. A run is long, since each fetches its layer's panels; but of
  // many samples, where the L2 cache holds the panels of all layers, it is one group: its rows lie side by side.
  const int64_t size = P::panels_size(p.dim, p.rank);
  const bool few = p.n <= 16 * P::group;  // then a task packs what it needs, in its own cache
  const bool wide = p.layers * size * sizeof(T) > (int64_t(512) << 10);
  const int64_t run = P::group * (wide ? 16 : few ? 8 : 1);
  Scratch<T> all_panels(few ? 0 : p.layers * size);
  T* shared = all_panels.data();
  if (!few) {
    parallel(p.layers, 1 + 20000 / work, [=](int64_t begin, int64_t end_layer) {
      for (int64_t layer = begin; layer < end_layer; ++layer) P::pack(layer_basis(layer), shared + layer * size);
    });
  }
  const bool past = P::streams(out, p.dim, p.n * p.layers * p.dim * sizeof(T));
  const int64_t tasks = p.layers * ((p.n + run - 1) / run);
  parallel(tasks, 1 + 20000 / (work * std::clamp<int64_t>(p.n, 1, run)), [=](int64_t begin, int64_t end_task) {
    Scratch<T> sums(P::sums_size(p.rank)), codes(P::codes_size(p.rank)), own(few ? size : 0);
    Buffer<int64_t> kept(p.rank);
    for (int64_t r = 0; r < p.rank; ++r) kept[r] = r;
    for (int64_t task = begin; task < end_task; ++task) {
      const int64_t layer = task % p.layers, last = std::min((task / p.layers + 1) * run, p.n);
      const T* panel = few ? own.data() : shared + layer * size;
      if (few) P::pack(layer_basis(layer), own.data());
      for (int64_t first = task / p.layers * run; first < last; first += P::group) {
        const int64_t n = std::min(P::group, last - first), next = std::min(task + 1, end_task - 1);
        const bool more = first + P::group < last;  // in this run: else the next one's samples are fetched
        const int64_t next_first = more ? first + P::group : next / p.layers * run,
                      next_layer = more ? layer : next % p.layers;
        const T *in[P::group], *ahead[P::group];
        T* to[P::group];
        for (int64_t s = 0; s < n; ++s) {
          in[s] = w + (first + s) * p.w_row + layer * p.w_layer;
          ahead[s] = w + std::min(next_first + s, p.n - 1) * p.w_row + next_layer * p.w_layer;
          to[s] = out + ((first + s) * p.layers + layer) * p.dim;
        }
        P::reduce(in, n, p.dim, P::packed(panel, p.rank), sums, codes.data());
        const auto expand = [&](auto far) {
          P::template expand<far.value>(codes.data(), n, p.rank, kept.data(), panel, p.rank, p.dim, nullptr, T(1), to,
                                        ahead, n);
        };
        past ? expand(std::true_type()) : expand(std::false_type());
      }
    }
    if (past) finish_stores();
  });
}

template void project_onto_basis(const float*, const float*, const ProjectParams&, float*);
template void project_onto_basis(const double*, const double*, const ProjectParams&, double*);

}  // namespace sage_fast::SAGE_ISA
