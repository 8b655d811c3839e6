// Which samples each task of edit_latents takes.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../edit_latents.h"

namespace sage_fast {

struct EditRuns {
  static constexpr int64_t length = 16;  // samples of a task, at most

  std::vector<int64_t> rows;    // [n] of class_embedding, of each sample
  std::vector<int64_t> order;   // [n] samples; those of one mask stand together
  std::vector<int64_t> starts;  // [count + 1] of the runs in order

  // class_index [n] or null
  EditRuns(const int64_t* class_index, const EditParams& p) : rows(p.n), order(p.n) {
    if (class_index != nullptr) {
      for (int64_t i = 0; i < p.n; ++i) {
        rows[i] = class_index[i];
        if (rows[i] < 0 || rows[i] >= p.rows) {
          throw std::invalid_argument("sage_fast: edit_latents: class_index must be 0 to B - 1 = " +
                                      std::to_string(p.rows - 1) + ", got " + std::to_string(rows[i]));
        }
      }
    } else if (p.rows > 1) {
      std::iota(rows.begin(), rows.end(), 0);
    }
    std::iota(order.begin(), order.end(), 0);
    const bool sorted = p.mask_rows > 1;
    if (sorted) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
    for (int64_t i = 0; i < p.n; ++i) {
      const bool other = i == 0 || (sorted && rows[order[i]] != rows[order[i - 1]]);
      if (other || i - starts.back() == length) starts.push_back(i);
    }
    starts.push_back(p.n);
  }

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
};

}  // namespace sage_fast
