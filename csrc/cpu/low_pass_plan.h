// Bands in blocks, made once for a size and a width and kept for the calls that follow.
#pragma once

#include <list>
#include <memory>
#include <mutex>

#include "../gaussian_low_pass.h"
#include "low_pass.h"

namespace sage_fast {

template <class T>
class LowPassPlan {
 public:
  LowPassPlan(int64_t h, int64_t w, const LowPassParams& p) : h_(h), w_(w), params_(p) {
    const double error = sizeof(T) == 4 ? 3e-8 : 1e-16;
    const LowPassAxis rows = low_pass_axis(h, p, error), cols = low_pass_axis(w, p, error);
    view_ = {h,
             w,
             pack(rows.down, kBandRows, kept_[0]),
             pack(cols.down, kBandCols<T>, kept_[1]),
             pack(cols.up, kBandCols<T>, kept_[2]),
             pack(rows.up, kBandRows, kept_[3])};
  }
  LowPassPlan(const LowPassPlan&) = delete;

  const LowPass<T>& view() const { return view_; }

  // The plan of an image size, one of the last few or a new one.
  static std::shared_ptr<const LowPassPlan> of(int64_t h, int64_t w, const LowPassParams& p) {
    static std::mutex mutex;
    static std::list<std::shared_ptr<const LowPassPlan>> recent;
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = recent.begin(); it != recent.end(); ++it) {
      if ((*it)->is_of(h, w, p)) {
        recent.splice(recent.begin(), recent, it);
        return recent.front();
      }
    }
    recent.push_front(std::make_shared<const LowPassPlan>(h, w, p));
    if (recent.size() > 8) recent.pop_back();
    return recent.front();
  }

 private:
  struct Kept {
    std::vector<int64_t> begin, index;
    std::vector<T> weights;
  };

  bool is_of(int64_t h, int64_t w, const LowPassParams& p) const {
    return h == h_ && w == w_ && p.sigma == params_.sigma && p.reflect == params_.reflect && p.pixels == params_.pixels;
  }

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

  int64_t h_, w_;
  LowPassParams params_;
  Kept kept_[4];
  LowPass<T> view_;
};

}  // namespace sage_fast
