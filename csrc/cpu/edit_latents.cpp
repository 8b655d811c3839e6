#include "../edit_latents.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../latents.h"
#include "huge_pages.h"
#include "isa.h"

SAGE_DECLARE(template <class T> void edit_latents(const T* embeddings, const T* codes, const T* directions,
                                                  const bool* mask, const int64_t* row, const int64_t* order,
                                                  const int64_t* starts, int64_t runs, const EditParams& p, T* out))

namespace sage_fast {
namespace {

constexpr int64_t kRun = 16;  // samples of a task

// The row of class_embedding of each sample.
std::vector<int64_t> rows_of(const std::optional<Tensor>& class_index, const EditParams& p) {
  std::vector<int64_t> rows(p.n);
  if (class_index.has_value()) {
    const Tensor index = torch::stable::contiguous(*class_index);
    for (int64_t i = 0; i < p.n; ++i) {
      rows[i] = data<int64_t>(index)[i];
      require(rows[i] >= 0 && rows[i] < p.rows, "edit_latents: class_index must be 0 to B - 1");
    }
  } else if (p.rows > 1) {
    std::iota(rows.begin(), rows.end(), 0);
  }
  return rows;
}

Tensor edit_latents(Tensor class_embedding, Tensor codes, Tensor directions, double alpha, std::optional<Tensor> mask,
                    std::optional<Tensor> class_index) {
  check_edit(class_embedding, codes, directions, mask, class_index);
  class_embedding = last_axis_contiguous(class_embedding);
  codes = last_axis_contiguous(codes);
  directions = last_axis_contiguous(directions);
  if (mask.has_value()) mask = torch::stable::contiguous(*mask);
  const EditParams p = edit_params(class_embedding, codes, directions, mask, alpha);
  Tensor out = torch::stable::new_empty(codes, {p.n, p.layers, p.dim});
  const std::vector<int64_t> rows = rows_of(class_index, p);
  if (p.n * p.layers * p.dim == 0) return out;

  std::vector<int64_t> order(p.n), starts;
  std::iota(order.begin(), order.end(), 0);
  const bool sorted = p.mask_rows > 1;  // samples of one mask together
  if (sorted) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
  for (int64_t i = 0; i < p.n; ++i) {
    if (i == 0 || i - starts.back() == kRun || (sorted && rows[order[i]] != rows[order[i - 1]])) starts.push_back(i);
  }
  const int64_t runs = static_cast<int64_t>(starts.size());
  starts.push_back(p.n);

  dispatch(codes, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data<T>(out);
    prefer_huge_pages(to, p.n * p.layers * p.dim * sizeof(T));
    SAGE_CALL(edit_latents<T>)(data<T>(class_embedding), data<T>(codes), data<T>(directions),
                               mask.has_value() ? data<bool>(*mask) : nullptr, rows.data(), order.data(), starts.data(),
                               runs, p, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("edit_latents", TORCH_BOX(&edit_latents)); }

}  // namespace sage_fast
