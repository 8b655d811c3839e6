#include "../edit_latents.h"

#include "../latents.h"
#include "edit_runs.h"
#include "huge_pages.h"
#include "kernels.h"

namespace sage_fast {
namespace {

Tensor edit_latents(Tensor class_embedding, Tensor codes, Tensor directions, double alpha, std::optional<Tensor> mask,
                    std::optional<Tensor> class_index) {
  check_edit(class_embedding, codes, directions, mask, class_index);
  class_embedding = last_axis_contiguous(class_embedding);
  codes = last_axis_contiguous(codes);
  directions = last_axis_contiguous(directions);
  if (mask.has_value()) mask = torch::stable::contiguous(*mask);
  const EditParams p = edit_params(class_embedding, codes, directions, mask, alpha);
  Tensor out = new_latents(codes, p.n, p.layers, p.dim);
  if (class_index.has_value()) class_index = torch::stable::contiguous(*class_index);
  const EditRuns runs(class_index.has_value() ? data<int64_t>(*class_index) : nullptr, p);
  if (p.n * p.layers * p.dim == 0) return out;

  dispatch(codes, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data<T>(out);
    prefer_huge_pages(to, p.n * p.layers * p.dim * sizeof(T));
    SAGE_CALL(edit_latents<T>)(data<T>(class_embedding), data<T>(codes), data<T>(directions),
                               mask.has_value() ? data<uint8_t>(*mask) : nullptr, runs.rows.data(), runs.order.data(),
                               runs.starts.data(), runs.count(), p, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("edit_latents", TORCH_BOX(&edit_latents)); }

}  // namespace sage_fast
