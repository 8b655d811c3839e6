#include "../latents.h"
#include "isa.h"

SAGE_DECLARE(template <class T> void combine_rows(const T* weights, const T* table, const T* centre,
                                                  const int64_t* rows, const int64_t* columns, const CombineParams& p,
                                                  T* out))

namespace sage_fast {
namespace {

void require_below(const Tensor& index, int64_t limit, const char* message) {
  const int64_t* values = data<int64_t>(index);
  bool inside = true;
  for (int64_t i = 0; i < index.size(0); ++i) inside &= values[i] >= 0 && values[i] < limit;
  require(inside, message);
}

Tensor combine_rows(Tensor weights, Tensor table, Tensor centre, Tensor rows, Tensor columns) {
  check_combination(weights, table, centre, rows, columns);
  weights = rows_contiguous(weights);
  table = rows_contiguous(table);
  centre = torch::stable::contiguous(centre);
  rows = torch::stable::contiguous(rows);
  columns = torch::stable::contiguous(columns);
  require_below(rows, table.size(0), "combine_rows: rows must be rows of table");
  require_below(columns, table.size(1), "combine_rows: columns must be columns of table");
  const CombineParams p{weights.size(0), rows.size(0), columns.size(0), weights.stride(0), table.stride(0)};
  Tensor out = torch::stable::new_empty(weights, {p.n, p.columns});
  if (p.m == 0) return torch::stable::zero_(out);
  dispatch(weights, [&](auto zero) {
    using T = decltype(zero);
    SAGE_CALL(combine_rows<T>)(data<T>(weights), data<T>(table), data<T>(centre), data<int64_t>(rows),
                               data<int64_t>(columns), p, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) { m.impl("combine_rows", TORCH_BOX(&combine_rows)); }

}  // namespace sage_fast
