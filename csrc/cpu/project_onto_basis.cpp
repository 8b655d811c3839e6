#include "../project_onto_basis.h"

#include <vector>

#include "parallel.h"

namespace sage_fast {
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

// w [n, layers, dim], basis [layers, dim, rank] -> out [n, layers, dim]. A task takes one layer and a run of samples:
// the layer's basis, transposed, stays in its cache.
template <class T>
void run(const T* w, const T* basis, const ProjectParams& p, T* out) {
  constexpr int64_t block = 32;
  const int64_t blocks = (p.n + block - 1) / block;
  parallel(p.layers * blocks, 1, [=](int64_t begin, int64_t end) {
    std::vector<T> rows(p.rank * p.dim);  // basis of the layer, [rank, dim]
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

Tensor project_onto_basis(Tensor w_plus, Tensor basis) {
  require(w_plus.dim() == 3 && basis.dim() == 3, "project_onto_basis: w_plus must be [N, L, D] and basis [L, D, R]");
  ProjectParams p{w_plus.size(0), w_plus.size(1), w_plus.size(2), basis.size(2)};
  require(basis.size(0) == p.layers && basis.size(1) == p.dim, "project_onto_basis: basis must be [L, D, R] of w_plus");
  require(basis.scalar_type() == w_plus.scalar_type(), "project_onto_basis: basis must have the dtype of w_plus");
  w_plus = torch::stable::contiguous(w_plus);
  basis = torch::stable::contiguous(basis);
  Tensor out = torch::stable::empty_like(w_plus);
  dispatch(w_plus, [&](auto zero) {
    using T = decltype(zero);
    run<T>(data<T>(w_plus), data<T>(basis), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("project_onto_basis", TORCH_BOX(&project_onto_basis)); }

}  // namespace sage_fast
