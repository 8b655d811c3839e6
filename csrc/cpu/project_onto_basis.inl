#include "../project_onto_basis.h"

namespace sage_fast::SAGE_ISA {
namespace {

// Sixteen partial sums, so that the loop vectorises without reordering a single sum at the compiler's whim.
template <class T>
T dot(const T* __restrict a, const T* __restrict b, int64_t n) {
  constexpr int64_t lanes = 16;
  T part[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) part[j] += a[i + j] * b[i + j];
  }
  T sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (T s : part) sum += s;
  return sum;
}

}  // namespace

// w [n, layers, dim], basis [layers, dim, rank] -> out [n, layers, dim]. A task takes one layer and a run of samples:
// the layer's basis, transposed, stays in its cache.
template <class T>
void project_onto_basis(const T* w, const T* basis, const ProjectParams& p, T* out) {
  constexpr int64_t block = 32;
  const int64_t blocks = (p.n + block - 1) / block;
  parallel(p.layers * blocks, 1, [=](int64_t begin, int64_t end) {
    Buffer<T> rows(p.rank * p.dim);  // basis of the layer, [rank, dim]
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / blocks, first = task % blocks * block;
      if (layer != loaded) {
        const T* b = basis + layer * p.dim * p.rank;
        for (int64_t d = 0; d < p.dim; ++d) {
          for (int64_t r = 0; r < p.rank; ++r) rows[r * p.dim + d] = b[d * p.rank + r];
        }
        loaded = layer;
      }
      for (int64_t i = first; i < std::min(p.n, first + block); ++i) {
        const T* in = w + (i * p.layers + layer) * p.dim;
        T* __restrict to = out + (i * p.layers + layer) * p.dim;
        for (int64_t d = 0; d < p.dim; ++d) to[d] = T(0);
        for (int64_t r = 0; r < p.rank; ++r) {
          const T* __restrict row = rows.data() + r * p.dim;
          const T code = dot(in, row, p.dim);
          for (int64_t d = 0; d < p.dim; ++d) to[d] += code * row[d];
        }
      }
    }
  });
}

template void project_onto_basis(const float*, const float*, const ProjectParams&, float*);
template void project_onto_basis(const double*, const double*, const ProjectParams&, double*);

}  // namespace sage_fast::SAGE_ISA
