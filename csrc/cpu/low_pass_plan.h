// Bands in blocks.
#pragma once

#include "../gaussian_low_pass.h"
#include "low_pass.h"

namespace sage_fast {

template <class T>
class LowPassPlan {
 public:
  LowPassPlan(int64_t h, int64_t w, const LowPassParams& p) {
    const LowPassAxis rows = low_pass_axis(h, p, kLowPassError<T>), cols = low_pass_axis(w, p, kLowPassError<T>);
    view_ = {h,
             w,
             pack(rows.down, kBandRows, kept_[0]),
             pack(cols.down, kBandCols<T>, kept_[1]),
             pack(cols.up, kBandCols<T>, kept_[2]),
             pack(rows.up, kBandRows, kept_[3])};
  }
  LowPassPlan(const LowPassPlan&) = delete;

  const LowPass<T>& view() const { return view_; }

 private:
  struct Kept {
    std::vector<int64_t> begin, index;
    std::vector<T> weights;
  };

  static BandBlocks<T> pack(const Band& band, int64_t block, Kept& kept) {
    const int64_t blocks = (band.rows() + block - 1) / block;
    kept.begin.push_back(0);
    std::vector<double> weights;              // [index, block]
    std::vector<int64_t> where(band.from.n);  // of an input in this block
    for (int64_t b = 0; b < blocks; ++b) {
      std::fill(where.begin(), where.end(), -1);
      const auto each = [&](auto&& f) {  // f(input, output in the block, weight)
        for (int64_t i = b * block; i < std::min(band.rows(), (b + 1) * block); ++i) {
          for (int64_t j = 0; j < band.width; ++j) {
            const double weight = band.weights[i * band.width + j];
            if (weight != 0) f(band.from.at(band.first[i] + j), i % block, weight);
          }
        }
      };
      each([&](int64_t from, int64_t, double) { where[from] = 0; });
      for (int64_t from = 0; from < band.from.n; ++from) {
        if (where[from] < 0) continue;
        where[from] = static_cast<int64_t>(kept.index.size());
        kept.index.push_back(from);
      }
      weights.resize(kept.index.size() * block, 0.0);
      each([&](int64_t from, int64_t i, double weight) { weights[where[from] * block + i] += weight; });
      kept.begin.push_back(static_cast<int64_t>(kept.index.size()));
    }
    kept.weights.assign(weights.begin(), weights.end());
    return {band.from.n, band.rows(), blocks, kept.begin.data(), kept.index.data(), kept.weights.data()};
  }

  Kept kept_[4];
  LowPass<T> view_;
};

}  // namespace sage_fast
