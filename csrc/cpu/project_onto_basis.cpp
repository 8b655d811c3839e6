#include "../project_onto_basis.h"

#include "../latents.h"
#include "huge_pages.h"
#include "kernels.h"

namespace sage_fast {
namespace {

Tensor project_onto_basis(Tensor w_plus, Tensor basis) {
  check_projection(w_plus, basis);
  w_plus = last_axis_contiguous(w_plus);
  basis = last_axis_contiguous(basis);
  const ProjectParams p = projection_params(w_plus, basis);
  Tensor out = new_latents(w_plus, p.n, p.layers, p.dim);
  if (p.rank == 0) return torch::stable::zero_(out);
  if (p.n * p.layers * p.dim == 0) return out;
  dispatch(w_plus, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data<T>(out);
    prefer_huge_pages(to, p.n * p.layers * p.dim * sizeof(T));
    SAGE_CALL(project_onto_basis<T>)(data<T>(w_plus), data<T>(basis), p, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("project_onto_basis", TORCH_BOX(&project_onto_basis)); }

}  // namespace sage_fast
