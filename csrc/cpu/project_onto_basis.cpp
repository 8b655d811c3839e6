#include "../project_onto_basis.h"

#include "../tensor.h"
#include "isa.h"

SAGE_DECLARE(template <class T> void project_onto_basis(const T* w, const T* basis, const ProjectParams& p, T* out))

namespace sage_fast {
namespace {

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
    SAGE_CALL(project_onto_basis<T>)(data<T>(w_plus), data<T>(basis), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("project_onto_basis", TORCH_BOX(&project_onto_basis)); }

}  // namespace sage_fast
