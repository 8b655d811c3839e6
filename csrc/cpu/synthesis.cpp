#include "../synthesis.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "../tensor.h"
#include "isa.h"
#include "workspace.h"

SAGE_DECLARE(void synthesis(const SynthesisNetwork& net, Workspace& workspace))
SAGE_DECLARE(int64_t synthesis_packed_size(const PackShape& shape))
SAGE_DECLARE(void synthesis_pack(const float* weight, const PackShape& shape, void* out))

namespace sage_fast {

namespace {

const float* floats(const Tensor& x, std::vector<int64_t> shape, const char* message) {
  require(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == int64_t(shape.size()), message);
  for (size_t i = 0; i < shape.size(); ++i) require(x.size(i) == shape[i], message);
  return data<float>(x);
}

constexpr int64_t kPerLayer = 6, kPerImage = 4;

// As in the generator; torch keeps the pointer only.
const char* name_of(bool image, int64_t index) {
  constexpr int64_t kNames = 64;
  static const std::vector<std::string> names = [] {
    std::vector<std::string> made{"conv1", "to_rgb1"};
    for (int64_t i = 1; i < kNames; ++i) {
      for (const char* list : {"convs.", "to_rgbs."}) made.push_back(list + std::to_string(i - 1));
    }
    return made;
  }();
  return names[2 * std::min(index, kNames - 1) + image].c_str();
}

// Makes each layer a range of torch's profiler. Where none
// listens, torch makes and drops an empty guard.
class LayerRanges : public LayerListener {
 public:
  explicit LayerRanges(int64_t n_layers) : n_layers_(n_layers) {}
  ~LayerRanges() { ends(); }
  LayerRanges(const LayerRanges&) = delete;
  void operator=(const LayerRanges&) = delete;

  void begins(int64_t index) override {
    const bool image = index >= n_layers_;
    const char* name = name_of(image, image ? index - n_layers_ : index);
    aoti_record_function_start(name, nullptr, nullptr, 0, &range_);
  }
  void ends() override {
    if (range_ != nullptr) aoti_record_function_end(range_);
    range_ = nullptr;
  }

 private:
  int64_t n_layers_;
  AtenRecordFunctionHandle range_ = nullptr;
};

// layers: for each styled layer packed (bfloat16 where its products are), squares, affine, affine bias, bias, noise
// (empty: none). images: for each size weight, affine, affine bias, bias.
Tensor synthesis(Tensor w_plus, Tensor input, std::vector<Tensor> layers, std::vector<Tensor> images,
                 std::vector<double> strengths, double slope, double gain, double clamp) {
  const int64_t n_layers = int64_t(layers.size()) / kPerLayer, n_images = int64_t(images.size()) / kPerImage;
  require(n_layers >= 1 && n_layers * kPerLayer == int64_t(layers.size()),
          "synthesis: layers must hold 6 tensors each");
  require(n_images * kPerImage == int64_t(images.size()) && n_layers == 2 * n_images - 1,
          "synthesis: images must hold 4 tensors for each of (layers + 1) / 2 sizes");
  require(int64_t(strengths.size()) == n_layers, "synthesis: strengths must hold one number a layer");
  require(slope >= 0 && slope <= 1 && gain > 0, "synthesis: slope must be 0 to 1 and gain positive");
  require(input.dim() == 4, "synthesis: input must be [1, C, 4, 4]");
  require(w_plus.dim() == 3 && w_plus.size(1) >= n_layers + 1, "synthesis: w_plus must be [N, L, D]");
  w_plus = torch::stable::contiguous(w_plus);
  const int64_t n = w_plus.size(0), dim = w_plus.size(2);
  const char* bad = "synthesis: a tensor of the network has another shape or is not contiguous float32";
  std::vector<StyledLayer> styled(n_layers);
  std::vector<ImageLayer> to_image(n_images);
  int64_t c_in = input.size(1);
  for (int64_t i = 0; i < n_layers; ++i) {
    const Tensor* t = &layers[i * kPerLayer];
    const bool up = i % 2 == 1, bf16 = t[0].scalar_type() == ScalarType::BFloat16;
    const int64_t c_out = t[1].size(0), size = int64_t{4} << ((i + 1) / 2);
    const PackShape shape{c_out, c_in, up, bf16};
    require(c_in >= 1 && c_in <= 4096 && c_out >= 1, "synthesis: layers must have 1 to 4096 channels");
    require(!bf16 || has_bf16(), "synthesis: this processor has no bfloat16 products");
    require((bf16 || t[0].scalar_type() == ScalarType::Float) && t[0].is_contiguous() &&
                t[0].numel() == SAGE_CALL(synthesis_packed_size)(shape),
            "synthesis: packed weights of another layer, precision or processor; pack them again");
    const Tensor& noise = t[5];
    const bool has_noise = noise.numel() > 0, per_sample = has_noise && noise.size(0) != 1;
    styled[i] = {c_in,
                 c_out,
                 size,
                 up,
                 bf16,
                 values(t[0]),
                 floats(t[1], {c_out, c_in}, bad),
                 floats(t[2], {c_in, dim}, bad),
                 floats(t[3], {c_in}, bad),
                 floats(t[4], {c_out}, bad),
                 has_noise ? floats(noise, {per_sample ? n : 1, 1, size, size}, bad) : nullptr,
                 per_sample,
                 float(strengths[i])};
    c_in = c_out;
  }
  const int64_t n_channels = images[0].size(0);
  require(n_channels >= 1 && n_channels <= kMaxImageChannels, "synthesis: images must have 1 to 4 channels");
  for (int64_t i = 0; i < n_images; ++i) {
    const Tensor* t = &images[i * kPerImage];
    const int64_t c = styled[2 * i].c_out;
    to_image[i] = {c, floats(t[0], {n_channels, c}, bad), floats(t[1], {c, dim}, bad), floats(t[2], {c}, bad),
                   floats(t[3], {n_channels}, bad)};
  }
  const int64_t size = styled.back().size;
  Tensor out = torch::stable::new_empty(w_plus, {n, n_channels, size, size});
  if (n == 0) return out;
  LayerRanges ranges(n_layers);
  const SynthesisNetwork net{n,
                             dim,
                             w_plus.size(1),
                             n_channels,
                             n_layers,
                             n_images,
                             floats(input, {1, styled[0].c_in, 4, 4}, bad),
                             styled.data(),
                             to_image.data(),
                             floats(w_plus, {n, w_plus.size(1), dim}, bad),
                             float(slope),
                             float(gain),
                             float(clamp),
                             mutable_data<float>(out),
                             &ranges};
  Lease workspace;
  SAGE_CALL(synthesis)(net, *workspace);
  return out;
}

Tensor synthesis_pack(Tensor weight, bool up, bool bf16) {
  require(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
          "synthesis_pack: weight must be float32 [C_out, C_in, 3, 3]");
  require(!bf16 || has_bf16(), "synthesis_pack: this processor has no bfloat16 products");
  weight = torch::stable::contiguous(weight);
  const PackShape shape{weight.size(0), weight.size(1), up, bf16};
  Tensor out = torch::stable::new_empty(weight, {SAGE_CALL(synthesis_packed_size)(shape)},
                                        bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  SAGE_CALL(synthesis_pack)(data<float>(weight), shape, out.mutable_data_ptr());
  return out;
}

// What differs when weights have other values than before, whoever wrote them and how: a hash of a sample of them. Of a
// large matrix each row gives lines in other places than its neighbours, so that a write to rows or to columns shows
// too.
int64_t synthesis_fingerprint(std::vector<Tensor> weights) {
  constexpr int64_t kLine = 64, kLanes = kLine / 8, kWhole = 1 << 14;  // bytes, chains of products side by side, bytes
  uint64_t lanes[kLanes] = {};
  const auto take = [&](const unsigned char* at, int64_t count) {
    uint64_t words[kLanes] = {};
    std::memcpy(words, at, size_t(count));
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = std::rotl(lanes[l] ^ words[l], 27) * 0x9E3779B97F4A7C15;
  };
  for (Tensor& weight : weights) {
    weight = torch::stable::contiguous(weight);
    const auto* bytes = data<unsigned char>(weight);
    const Dtype dtype = dtype_of(weight);
    const int64_t n = weight.numel() * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2);
    int64_t dim = 0;
    while (dim + 1 < weight.dim() && weight.size(dim) == 1) ++dim;
    const int64_t rows = weight.dim() ? std::max<int64_t>(1, weight.size(dim)) : 1, row = n / rows;
    if (n <= kWhole || row < kLine) {
      for (int64_t at = 0; at < n; at += kLine) take(bytes + at, std::min(kLine, n - at));
      continue;
    }
    const int64_t lines = (row + kLine - 1) / kLine;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t l = r % lines; l < lines; l += rows) take(bytes + r * row + std::min(l * kLine, row - kLine), kLine);
    }
  }
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum = std::rotl(sum ^ lane, 27) * 0x9E3779B97F4A7C15;
  return int64_t(sum);
}

// Whether bf16=True is possible here; a tensor only carries the question to the device's kernels.
bool has_bf16_products(Tensor) { return has_bf16(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CPU, m) {
  m.impl("synthesis", TORCH_BOX(&synthesis));
  m.impl("synthesis_pack", TORCH_BOX(&synthesis_pack));
  m.impl("synthesis_fingerprint", TORCH_BOX(&synthesis_fingerprint));
  m.impl("has_bf16_products", TORCH_BOX(&has_bf16_products));
}

}  // namespace sage_fast
