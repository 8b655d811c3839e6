// Three kernels: tiles in shared memory for the 4 x 4 filters of StyleGAN2 where channels come first, columns of packs
// for the same where they come last, and one for anything else. All sum in float32 at least, over the filter as it is:
// whether it has rank one is known on the device only, and sixteen products a pixel are less than its memory traffic.
#include "../upfirdn2d.h"
#include "common.cuh"

namespace sage_fast {
namespace {

constexpr int kThreads = 256, kSide = 4;
#ifdef SAGE_FAST_ON_HOST  // both sides of the choice in small tests
constexpr int64_t kEnoughThreads = 32;
#else
constexpr int64_t kEnoughThreads = 100000;  // of 16 warps on each multiprocessor of the larger cards, and more
#endif

// f, in any dtype of the kernels, as correlation taps in shared memory
template <class T, class A>
__device__ void read_taps(const T* __restrict__ f, int n_taps, bool flip, double gain, A* taps) {
  for (int i = threadIdx.x; i < n_taps; i += kThreads) {
    taps[i] = static_cast<A>(f[flip ? i : n_taps - 1 - i]) * static_cast<A>(gain);
  }
  __syncthreads();
}

// x [planes, h, w, inner] -> y [planes, out_h, out_w, inner]; a thread has one pack of N channels, and only the taps
// that meet a pixel of x
template <class T, int N>
__global__ void any(const T* __restrict__ x, const T* __restrict__ f, UpfirdnParams p, int64_t out_h, int64_t out_w,
                    T* __restrict__ y) {
  using A = typename Accumulator<T>::type;
  __shared__ A taps[32 * 32];
  read_taps(f, static_cast<int>(p.kh * p.kw), p.flip, p.gain, taps);
  const int64_t packs = p.inner / N;
  SAGE_FAST_GRID_STRIDE(i, p.planes * out_h * out_w * packs) {
    const int64_t pack = i % packs, pixel = i / packs, plane = pixel / out_w / out_h;
    const int64_t top = pixel / out_w % out_h * p.down - p.top, left = pixel % out_w * p.down - p.left;
    // first pixel of x at or behind the corner of the window, and the tap that meets it
    const int64_t y0 = top > 0 ? (top + p.up - 1) / p.up : 0, x0 = left > 0 ? (left + p.up - 1) / p.up : 0;
    const Pack<T, N>* in = reinterpret_cast<const Pack<T, N>*>(x) + plane * p.h * p.w * packs + pack;
    A sum[N] = {};
    for (int64_t yy = y0, ky = y0 * p.up - top; yy < p.h && ky < p.kh; ++yy, ky += p.up) {
      for (int64_t xx = x0, kx = x0 * p.up - left; xx < p.w && kx < p.kw; ++xx, kx += p.up) {
        const Pack<T, N> v = in[(yy * p.w + xx) * packs];
        const A tap = taps[ky * p.kw + kx];
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += tap * static_cast<A>(v.v[k]);
      }
    }
    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.v[k] = static_cast<T>(sum[k]);
    reinterpret_cast<Pack<T, N>*>(y)[i] = out;
  }
}

// Channels last, 4 x 4 taps, up 1: a thread has Rows x Columns neighbouring outputs of a pack, and reads each pixel
// that they meet once: 4.4 reads an output of 4 x 2, 10 of 2 x 1, which leaves more threads for small images.
template <class T, int N, int Down, int Rows, int Columns>
__global__ void __launch_bounds__(kThreads, 2)
    columns(const T* __restrict__ x, const T* __restrict__ f, UpfirdnParams p, int64_t out_h, int64_t out_w,
            T* __restrict__ y) {
  using A = typename Accumulator<T>::type;
  constexpr int High = (Rows - 1) * Down + kSide, Wide = (Columns - 1) * Down + kSide;
  __shared__ A taps[kSide * kSide];
  read_taps(f, kSide * kSide, p.flip, p.gain, taps);
  const int64_t packs = p.inner / N, along = (out_w + Columns - 1) / Columns, groups = (out_h + Rows - 1) / Rows;
  SAGE_FAST_GRID_STRIDE(i, p.planes * groups * along * packs) {
    const int64_t pack = i % packs, column = i / packs % along * Columns, row = i / packs / along % groups * Rows;
    const int64_t plane = i / packs / along / groups, top = row * Down - p.top, left = column * Down - p.left;
    const Pack<T, N>* in = reinterpret_cast<const Pack<T, N>*>(x) + plane * p.h * p.w * packs + pack;
    A sum[Rows][Columns][N] = {};
#pragma unroll
    for (int r = 0; r < High; ++r) {
      const int64_t yy = top + r;
      if (yy < 0 || yy >= p.h) continue;
#pragma unroll
      for (int c = 0; c < Wide; ++c) {
        const int64_t xx = left + c;
        if (xx < 0 || xx >= p.w) continue;
        const Pack<T, N> v = in[(yy * p.w + xx) * packs];
#pragma unroll
        for (int o = 0; o < Rows; ++o) {
#pragma unroll
          for (int q = 0; q < Columns; ++q) {
            const int ky = r - o * Down, kx = c - q * Down;
            if (ky < 0 || ky >= kSide || kx < 0 || kx >= kSide) continue;  // known to the compiler
#pragma unroll
            for (int k = 0; k < N; ++k) sum[o][q][k] += taps[ky * kSide + kx] * static_cast<A>(v.v[k]);
          }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < Rows; ++o) {
#pragma unroll
      for (int q = 0; q < Columns; ++q) {
        if (row + o >= out_h || column + q >= out_w) continue;
        Pack<T, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k) out.v[k] = static_cast<T>(sum[o][q][k]);
        reinterpret_cast<Pack<T, N>*>(y)[((plane * out_h + row + o) * out_w + column + q) * packs + pack] = out;
      }
    }
  }
}

template <class T, int N, int Down>
void launch_columns(const T* x, const T* f, const UpfirdnParams& p, int64_t out_h, int64_t out_w, T* y,
                    cudaStream_t stream) {
  const int64_t many = p.planes * ((out_h + 3) / 4) * ((out_w + 1) / 2) * (p.inner / N);
  if (many >= kEnoughThreads) {
    columns<T, N, Down, 4, 2><<<blocks_for(many, kThreads), kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
  } else {
    const int64_t few = p.planes * ((out_h + 1) / 2) * out_w * (p.inner / N);
    columns<T, N, Down, 2, 1><<<blocks_for(few, kThreads), kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
  }
}

// Channels first, 4 x 4 taps. A block makes 32 x 32 outputs, a thread four of them one below the other, from a tile of
// x with zeros beyond the image: every pixel is read from memory once, but for the borders of tiles.
template <class T, int Up, int Down>
__global__ void tiles(const T* __restrict__ x, const T* __restrict__ f, UpfirdnParams p, int64_t out_h, int64_t out_w,
                      T* __restrict__ y) {
  using A = typename Accumulator<T>::type;
  constexpr int Out = 32, Rows = 4, In = (Out - 1) * Down / Up + kSide / Up + 1, Count = kSide / Up;
  __shared__ A taps[kSide * kSide], tile[In][In];
  read_taps(f, kSide * kSide, p.flip, p.gain, taps);
  const int column = threadIdx.x % Out, row = threadIdx.x / Out * Rows;
  const int64_t wide = (out_w + Out - 1) / Out, high = (out_h + Out - 1) / Out;
  for (int64_t job = blockIdx.x; job < p.planes * high * wide; job += gridDim.x) {
    const int64_t plane = job / wide / high, out_y = job / wide % high * Out, out_x = job % wide * Out;
    // the tile begins at the first pixel that the first output meets
    const int64_t top = ceil_div(out_y * Down - p.top, Up), left = ceil_div(out_x * Down - p.left, Up);
    const T* in = x + plane * p.h * p.w;
    for (int i = threadIdx.x; i < In * In; i += kThreads) {
      const int64_t yy = top + i / In, xx = left + i % In;
      const bool inside = yy >= 0 && yy < p.h && xx >= 0 && xx < p.w;
      tile[i / In][i % In] = inside ? static_cast<A>(in[yy * p.w + xx]) : A(0);
    }
    __syncthreads();
    A sum[Rows] = {};
    if constexpr (Up == 1) {
#pragma unroll
      for (int r = 0; r < (Rows - 1) * Down + kSide; ++r) {
#pragma unroll
        for (int kx = 0; kx < kSide; ++kx) {
          const A v = tile[row * Down + r][column * Down + kx];
#pragma unroll
          for (int o = 0; o < Rows; ++o) {
            const int ky = r - o * Down;
            if (ky >= 0 && ky < kSide) sum[o] += taps[ky * kSide + kx] * v;
          }
        }
      }
    } else {
      // output o meets upsampled positions from `from` on; pixel `at` of the tile is the first, under tap `first`
      const int from_x = static_cast<int>(out_x - p.left - left * Up) + column, at_x = (from_x + Up - 1) / Up;
#pragma unroll
      for (int o = 0; o < Rows; ++o) {
        const int from_y = static_cast<int>(out_y - p.top - top * Up) + row + o, at_y = (from_y + Up - 1) / Up;
        const A* first = taps + (at_y * Up - from_y) * kSide + at_x * Up - from_x;
#pragma unroll
        for (int ky = 0; ky < Count; ++ky) {
#pragma unroll
          for (int kx = 0; kx < Count; ++kx) {
            sum[o] += first[(ky * kSide + kx) * Up] * tile[at_y + ky][at_x + kx];
          }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < Rows; ++o) {
      const int64_t out_row = out_y + row + o, out_column = out_x + column;
      if (out_row < out_h && out_column < out_w) {
        y[(plane * out_h + out_row) * out_w + out_column] = static_cast<T>(sum[o]);
      }
    }
    __syncthreads();  // before the next tile takes the place of this one
  }
}

template <class T>
void launch(const T* x, const T* f, const UpfirdnParams& p, T* y, cudaStream_t stream) {
  const int64_t out_h = p.out_h(), out_w = p.out_w(), n = p.planes * out_h * out_w * p.inner;
  const bool square = p.kh == kSide && p.kw == kSide;
  if (square && p.inner == 1 && p.up * p.down <= 2) {
    const int64_t jobs = p.planes * ((out_h + 31) / 32) * ((out_w + 31) / 32);
    const unsigned blocks = blocks_for(jobs, 1);
    if (p.up == 2) {
      tiles<T, 2, 1><<<blocks, kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
    } else if (p.down == 2) {
      tiles<T, 1, 2><<<blocks, kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
    } else {
      tiles<T, 1, 1><<<blocks, kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
    }
    return;
  }
  constexpr int N = pack_size<T>;
  const bool packed =
      p.inner % N == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  if (square && packed && p.up == 1 && p.down == 1) {
    launch_columns<T, N, 1>(x, f, p, out_h, out_w, y, stream);
  } else if (square && packed && p.up == 1 && p.down == 2) {
    launch_columns<T, N, 2>(x, f, p, out_h, out_w, y, stream);
  } else if (packed) {
    any<T, N><<<blocks_for(n / N, kThreads), kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
  } else {
    any<T, 1><<<blocks_for(n, kThreads), kThreads, 0, stream>>>(x, f, p, out_h, out_w, y);
  }
}

Tensor upfirdn2d(Tensor x, Tensor f, int64_t up, int64_t down, int64_t left, int64_t right, int64_t top, int64_t bottom,
                 bool flip_filter, double gain) {
  require(x.dim() == 4 && f.dim() == 2 && x.is_cuda() && f.is_cuda() && f.scalar_type() == x.scalar_type(),
          "upfirdn2d: x must be [N, C, H, W] and f [kh, kw] beside it, in its dtype");
  Scope stream(x);
  const bool last = channels_last(x);
  if (!last && !x.is_contiguous()) x = torch::stable::contiguous(x);
  if (!f.is_contiguous()) f = torch::stable::contiguous(f);
  const int64_t n = x.size(0), c = x.size(1);
  UpfirdnParams p{
      last ? n : n * c, x.size(2),   x.size(3), last ? c : 1, f.size(0), f.size(1), up, down, left, right, top,
      bottom,           flip_filter, gain};
  check(p);
  Tensor y = new_images(x, n, c, p.out_h(), p.out_w(), last);
  if (y.numel() == 0) return y;
  with_type(dtype_of(x), [&](auto zero) {
    using T = decltype(zero);
    launch(data<T>(x), data<T>(f), p, mutable_data<T>(y), stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sage_fast, CUDA, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d)); }

}  // namespace sage_fast
