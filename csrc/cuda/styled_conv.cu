#include <climits>
#include <tuple>

#include "epilogue_arguments.cuh"
#include "styled_conv.cuh"

namespace sage_fast {
namespace {

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int64_t kBlocks = 128;  // about as many as there are multiprocessors

// Output channels of a block: as many as there are, up to 128, but fewer when that leaves multiprocessors idle.
int columns_of(int64_t c, int64_t row_tiles) {
  if (c <= 32) return 32;
  return c <= 64 || (c + 127) / 128 * row_tiles < kBlocks ? 64 : 128;
}

int splits_of(int64_t blocks, int chunks) {
  int splits = 1;
  while (2 * splits <= chunks && blocks * splits < kBlocks) splits *= 2;
  return splits;
}

template <class T, int kColumns>
void launch(StyledConvArgs<T> a, const Tensor& image, cudaStream_t stream) {
  a.channel_tiles = int((a.out.c + kColumns - 1) / kColumns);
  const int64_t blocks = a.tiles.count() * a.phases * a.channel_tiles, area = kConvRows * kColumns;
  require(blocks <= INT_MAX, "styled_conv: too many tiles for one grid; take fewer samples a call");
  a.splits = splits_of(blocks, channel_chunks<T>(a.c_in));
  Tensor split_sums = torch::stable::new_empty(image, {a.splits > 1 ? a.splits * blocks * area : 0});
  Tensor parts = torch::stable::new_empty(image, {a.channel_tiles > 1 ? a.channel_tiles * image.numel() : 0});
  if (split_sums.numel()) a.split_sums = mutable_data<float>(split_sums);
  if (parts.numel()) a.image_parts = mutable_data<float>(parts);

  using Shared = ConvShared<T, kColumns>;
  const int bytes = Shared::bytes(a.tiles.patch_rows());
  constexpr int most = Shared::bytes(PixelTiles::kMostPatchRows);
  const auto convolve = convolve_tiles<T, kColumns>, join = join_splits<T, kColumns>;
  allow_shared(convolve, most);
  convolve<<<dim3(unsigned(blocks), unsigned(a.splits)), kConvThreads, bytes, stream>>>(a);
  if (a.split_sums) {
    allow_shared(join, most);
    join<<<unsigned(blocks), kConvThreads, bytes, stream>>>(a);
  }
  if (a.image_parts) join_image<T><<<blocks_for(image.numel(), kConvThreads), kConvThreads, 0, stream>>>(a);
}

std::tuple<Tensor, Tensor> styled_conv(Tensor x, Tensor weight, Tensor factor, Tensor bias, std::optional<Tensor> noise,
                                       double strength, std::optional<Tensor> next_style,
                                       std::optional<Tensor> image_weight, std::optional<Tensor> image_bias,
                                       std::optional<Tensor> skip, bool up, double slope, double gain, double clamp,
                                       int64_t columns) {
  const int64_t phases = up ? 4 : 1;
  require(x.dim() == 4 && x.is_cuda() && x.is_contiguous(), "styled_conv: x must be contiguous [N, H, W, C_in]");
  require(weight.dim() == 4 && weight.size(0) == phases && weight.size(2) == kTaps && weight.size(3) == x.size(3) &&
              weight.is_contiguous() && weight.scalar_type() == x.scalar_type() &&
              weight.get_device() == x.get_device() && weight.is_cuda(),
          "styled_conv: weight must be contiguous [1 or, for up, 4, C_out, 9, C_in] of x's dtype, beside it");
  require(image_weight.has_value() == image_bias.has_value() && (image_weight || !skip),
          "styled_conv: image_weight and image_bias come together, and skip with them alone");
  require(x.numel() / (x.size(3) ? x.size(3) : 1) <= INT_MAX, "styled_conv: x must have less than 2^31 pixels");
  require(columns == 0 || columns == 32 || columns == 64 || columns == 128,
          "styled_conv: columns must be 32, 64, 128 or, for a choice by the shape, 0");
  Scope stream(x);
  const int64_t n = x.size(0), c = weight.size(1), h = x.size(1) * (up ? 2 : 1), w = x.size(2) * (up ? 2 : 1);
  Tensor y = next_style ? torch::stable::new_empty(x, {n, h, w, c}) : torch::stable::new_empty(x, {0});
  Tensor image = image_bias ? torch::stable::new_empty(factor, {n, image_bias->numel(), h, w})
                            : torch::stable::new_empty(factor, {0});
  if (n == 0) return {y, image};
  dispatch_activation(x, [&](auto zero) {
    using T = decltype(zero);
    StyledConvArgs<T> a{};
    a.out = epilogue_arguments<T>(n, h, w, c, x, factor, bias, noise, strength, next_style, slope, gain, clamp, y);
    if (image_weight) a.to = image_arguments(a.out, *image_weight, *image_bias, skip, image);
    a.tiles = PixelTiles(n, x.size(1), x.size(2));
    a.weight = data<T>(weight), a.c_in = int(x.size(3)), a.phases = int(phases);
    require(a.c_in % kVector<T> == 0 && a.c_in > 0 && phases * c * kTaps <= INT_MAX,
            "styled_conv: input channels must fill vectors of 16 bytes");
    require(aligned(a.weight, 16) && aligned(a.out.y, 16) && aligned(a.out.factor, 8) && aligned(a.out.bias, 8) &&
                aligned(a.out.next, 8) && aligned(a.to.weight, 8) && a.out.pitch % 2 == 0,
            "styled_conv: activations and weights must be aligned to 16 bytes, rows of the other numbers to 8");
    const int64_t width = columns ? columns : columns_of(c, a.tiles.count() * phases);
    if (width == 128) launch<T, 128>(a, image, stream);
    if (width == 64) launch<T, 64>(a, image, stream);
    if (width == 32) launch<T, 32>(a, image, stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, image};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("styled_conv", TORCH_BOX(&styled_conv)); }

}  // namespace sage_fast
