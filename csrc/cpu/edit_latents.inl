#include "../edit_latents.h"
#include "layer_products.inl"

namespace sage_fast::SAGE_ISA {
namespace {

// Up to this many samples the directions are read as they lie; from here on packing them pays.
constexpr int64_t kFewEdits = 3;

// Columns of a layer that a sample uses, `kept` [k]; returns how many.
inline int64_t kept_columns(const uint8_t* mask, int64_t k, int64_t* kept) {
  int64_t count = 0;
  for (int64_t j = 0; j < k; ++j) {
    kept[count] = j;
    count += mask == nullptr || mask[j] != 0;
  }
  return count;
}

}  // namespace

// embeddings [rows, layers, dim], codes [n, layers, k], directions [layers, dim, k], mask [mask_rows, layers, k] or
// null, row [n] of each sample -> out [n, layers, dim]. Samples order[starts[i]] to order[starts[i + 1] - 1] share a
// mask; at most 16 of them. Masked directions are passed over. How a value is summed does not depend on the other
// samples. The mask is read byte by byte: a tensor of bool may hold other bytes than 0 and 1, by a view of other
// numbers.
template <class T>
void edit_latents(const T* embeddings, const T* codes, const T* directions, const uint8_t* mask, const int64_t* row,
                  const int64_t* order, const int64_t* starts, int64_t runs, const EditParams& p, T* out) {
  using P = Products<T>;
  const T* end = directions + (p.layers - 1) * p.direction_layer + (p.dim - 1) * p.direction_row + p.k;
  const auto matrix = [=](int64_t layer) {
    return Matrix<T>{directions + layer * p.direction_layer, p.dim, p.k, p.direction_row, end};
  };
  const auto mask_of = [=](int64_t i, int64_t layer) {
    return mask ? mask + ((p.mask_rows > 1 ? row[i] : 0) * p.layers + layer) * p.k : nullptr;
  };
  const auto embedding = [=](int64_t i, int64_t layer) {
    return embeddings + row[i] * p.embedding_row + layer * p.embedding_layer;
  };
  const T alpha = static_cast<T>(p.alpha);
  const int64_t work = 1 + p.dim * p.k / P::lanes;  // steps a sample
  if (p.n <= kFewEdits) {
    parallel(p.layers, 1 + 20000 / work, [=](int64_t begin, int64_t end_layer) {
      const int64_t padded = round_up(p.k, P::lanes);
      Buffer<T> kept_codes(padded), copy;
      Buffer<typename P::Lane> used(padded);
      for (int64_t layer = begin; layer < end_layer; ++layer) {
        for (int64_t i = 0; i < p.n; ++i) {
          const uint8_t* keep = mask_of(i, layer);
          const T* code = codes + i * p.code_row + layer * p.code_layer;
          for (int64_t j = 0; j < p.k; ++j) {
            used[j] = keep == nullptr || keep[j] != 0 ? -1 : 0;
            kept_codes[j] = used[j] ? code[j] : T(0);
          }
          P::expand_once(kept_codes.data(), used.data(), matrix(layer), copy, embedding(i, layer), alpha,
                         out + (i * p.layers + layer) * p.dim);
        }
      }
    });
    return;
  }
  const bool past = P::streams(out, p.dim, p.n * p.layers * p.dim * sizeof(T));
  parallel(p.layers * runs, 1 + 2000 / work, [=](int64_t begin, int64_t end_task) {
    constexpr int64_t most = 16;
    Scratch<T> panels(P::panels_size(p.dim, p.k)), kept_codes(most * p.k);
    Scratch<int64_t> kept(p.k + 1);
    int64_t packed = -1;
    for (int64_t task = begin; task < end_task; ++task) {
      const int64_t layer = task / runs, *samples = order + starts[task % runs];
      const int64_t n = starts[task % runs + 1] - starts[task % runs];
      if (layer != packed) P::pack(matrix(layer), panels.data());
      packed = layer;
      const int64_t count = kept_columns(mask_of(samples[0], layer), p.k, kept.data());
      const T* base[most];
      T* to[most];
      for (int64_t s = 0; s < n; ++s) {
        const T* code = codes + samples[s] * p.code_row + layer * p.code_layer;
        for (int64_t j = 0; j < count; ++j) kept_codes.data()[s * count + j] = code[kept.data()[j]];
        base[s] = embedding(samples[s], layer);
        to[s] = out + (samples[s] * p.layers + layer) * p.dim;
      }
      const auto expand = [&](auto far) {
        P::template expand<far.value>(kept_codes.data(), n, count, kept.data(), panels.data(), p.k, p.dim, base, alpha,
                                      to, nullptr, 0);
      };
      past ? expand(std::true_type()) : expand(std::false_type());
    }
    if (past) finish_stores();
  });
}

template void edit_latents(const float*, const float*, const float*, const uint8_t*, const int64_t*, const int64_t*,
                           const int64_t*, int64_t, const EditParams&, float*);
template void edit_latents(const double*, const double*, const double*, const uint8_t*, const int64_t*, const int64_t*,
                           const int64_t*, int64_t, const EditParams&, double*);

}  // namespace sage_fast::SAGE_ISA
