// upsample_mask_loss on CUDA. Forward: some blocks share a map, sum (2) and (3) over their pixels, and a second kernel
// adds their parts in order. Backward: a block owns a row of samples of a map; it gathers (5) of the output rows around
// it into one row in shared memory, and each thread then gathers the columns around its sample. No atomics: each output
// pixel is computed for the two rows of samples around it. Equation numbers: ovseg_kernels/ops/upsample_mask_loss.py.
#include "../common/block.cuh"
#include "upsample_mask_loss_cuda.h"

namespace ovseg {
namespace {

constexpr unsigned kPixelThreads = 128;

// Everything (2) and (5) need of one pixel. Logarithms by softplus: log(1 - q) would be -infinity from x = 17 on.
template <typename A>
struct Pixel {
  A q, v, softplus, slope;  // sigmoid(x), sigmoid(-t), softplus(-t), q (1 - q)

  __device__ Pixel(A x, bool positive) {
    const A e = exp(-fabs(x)), large = A(1) / (A(1) + e), small = e * large, t = positive ? x : -x;
    q = x < A(0) ? small : large;
    v = t < A(0) ? large : small;
    softplus = softplus_with(-t, e);
    slope = large * small;
  }
};

template <typename A>
__device__ A power_of(A v, A gamma) {
  return gamma == A(2) ? v * v : pow(v, gamma);
}

template <typename A>
__device__ A upsampled(const A* map, int64_t w, const Between<A>& y, const Between<A>& x) {
  const A *above = map + y.low * w, *below = map + y.high * w;
  return x.to_low * (y.to_low * above[x.low] + y.to_high * below[x.low]) +
         x.to_high * (y.to_low * above[x.high] + y.to_high * below[x.high]);
}

template <typename A>
__global__ void __launch_bounds__(kPixelThreads)
    upsample_mask_loss_fwd_kernel(MaskLossParams<A> p, int64_t splits, A* parts) {
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t plane = blockIdx.x, split = blockIdx.y, c = plane % p.C, all = p.H * p.W;
  const A* map = p.logits + plane * p.h * p.w;
  const int32_t* codes = p.codes + plane / p.C * all;
  A sum[5] = {0, 0, 0, 0, 0};
  const int64_t end = all * (split + 1) / splits;
  for (int64_t i = all * split / splits + threadIdx.x; i < end; i += kPixelThreads) {
    const int32_t code = codes[i];
    if (code == kIgnored) continue;
    const Between<A> y = between<A>(i / p.W, p.h, p.H), x = between<A>(i % p.W, p.w, p.W);
    const bool positive = code == c;
    const Pixel<A> at(upsampled(map, p.w, y, x), positive);
    sum[0] += (positive ? p.alpha : A(1) - p.alpha) * power_of(at.v, p.gamma) * at.softplus;
    sum[1] += at.q, sum[4] += A(1);
    if (positive) sum[2] += at.q, sum[3] += A(1);
  }
  block_sum<kPixelThreads>(sum, reinterpret_cast<A*>(memory));
  if (threadIdx.x == 0) {
    for (int64_t k = 0; k < 5; ++k) parts[(split * 5 + k) * p.B * p.C + plane] = sum[k];
  }
}

template <typename A>
__global__ void __launch_bounds__(kPixelThreads)
    upsample_mask_loss_finish_kernel(MaskLossParams<A> p, int64_t splits, const A* parts) {
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * kPixelThreads + threadIdx.x, maps = p.B * p.C;
  if (plane >= maps) return;
  A sum[5] = {0, 0, 0, 0, 0};
  for (int64_t split = 0; split < splits; ++split) {
    for (int64_t k = 0; k < 5; ++k) sum[k] += parts[(split * 5 + k) * maps + plane];
  }
  finish_mask_loss(p, plane, sum);
}

// How many pixels of an image count.
template <typename A>
__global__ void __launch_bounds__(kPixelThreads) upsample_mask_loss_count_kernel(MaskLossParams<A> p, A* counts) {
  OVSEG_DYNAMIC_SHARED(memory);
  A sum = 0;
  for (int64_t i = threadIdx.x; i < p.H * p.W; i += kPixelThreads) {
    sum += p.codes[blockIdx.x * p.H * p.W + i] == kIgnored ? A(0) : A(1);
  }
  sum = block_sum<kPixelThreads>(sum, reinterpret_cast<A*>(memory));
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

template <typename A>
__global__ void __launch_bounds__(kPixelThreads) upsample_mask_loss_bwd_kernel(MaskLossParams<A> p, const A* counts) {
  OVSEG_DYNAMIC_SHARED(memory);
  A* row = reinterpret_cast<A*>(memory);  // [W]: gradients of the outputs, gathered for this row of samples
  const int64_t plane = blockIdx.x, sample = blockIdx.y, c = plane % p.C;
  const A* map = p.logits + plane * p.h * p.w;
  const int32_t* codes = p.codes + plane / p.C * p.H * p.W;
  const MaskLossWeights<A> weights = mask_loss_weights(p, plane, counts[plane / p.C]);
  const int64_t Y0 = sample ? first_output<A>(sample - 1, p.h, p.H) : 0, Y1 = first_output<A>(sample + 1, p.h, p.H);
  for (int64_t X = threadIdx.x; X < p.W; X += kPixelThreads) {
    const Between<A> x = between<A>(X, p.w, p.W);
    A sum = A(0);
    for (int64_t Y = Y0; Y < Y1; ++Y) {
      const int32_t code = codes[Y * p.W + X];
      if (code == kIgnored) continue;
      const Between<A> y = between<A>(Y, p.h, p.H);
      const bool positive = code == c;
      const Pixel<A> at(upsampled(map, p.w, y, x), positive);
      const A bend = power_of(at.v, p.gamma) * (p.gamma * (A(1) - at.v) * at.softplus + at.v);
      const A focal = weights.focal * (positive ? -p.alpha : A(1) - p.alpha) * bend;
      const A dice = (weights.dice - (positive ? weights.dice_y : A(0))) * at.slope;
      sum += ((y.low == sample ? y.to_low : A(0)) + (y.high == sample ? y.to_high : A(0))) * (focal + dice);
    }
    row[X] = sum;
  }
  __syncthreads();
  for (int64_t column = threadIdx.x; column < p.w; column += kPixelThreads) {
    const int64_t X0 = column ? first_output<A>(column - 1, p.w, p.W) : 0, X1 = first_output<A>(column + 1, p.w, p.W);
    A sum = A(0);
    for (int64_t X = X0; X < X1; ++X) {
      const Between<A> x = between<A>(X, p.w, p.W);
      sum += ((x.low == column ? x.to_low : A(0)) + (x.high == column ? x.to_high : A(0))) * row[X];
    }
    p.grad[(plane * p.h + sample) * p.w + column] = sum;
  }
}

}  // namespace

template <typename A>
const char* upsample_mask_loss_on_device(const MaskLossParams<A>& p, A* parts, void* stream) {
  const int64_t maps = p.B * p.C, splits = mask_loss_splits(p);
  if (maps == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(maps), static_cast<unsigned>(splits));
  const size_t shared = 5 * kPixelThreads / 32 * sizeof(A);
  OVSEG_TRY(OVSEG_LAUNCH(upsample_mask_loss_fwd_kernel<A>, grid, kPixelThreads, shared, stream, p, splits, parts));
  const unsigned blocks = static_cast<unsigned>(ceil_div(maps, kPixelThreads));
  return OVSEG_LAUNCH(upsample_mask_loss_finish_kernel<A>, blocks, kPixelThreads, 0, stream, p, splits, parts);
}

template <typename A>
const char* upsample_mask_loss_backward_on_device(const MaskLossParams<A>& p, A* counts, void* stream) {
  if (p.B == 0) return nullptr;
  if (p.h > 65535) return "more than 65535 rows of samples; use OVSEG_BACKEND=reference";
  const size_t row = p.W * sizeof(A), sums = 5 * kPixelThreads / 32 * sizeof(A);
  if (row > 96 * 1024) return "labels wider than 24576 pixels (float64: 12288); use OVSEG_BACKEND=reference";
  const unsigned images = static_cast<unsigned>(p.B);
  OVSEG_TRY(OVSEG_LAUNCH(upsample_mask_loss_count_kernel<A>, images, kPixelThreads, sums, stream, p, counts));
  const dim3 grid(static_cast<unsigned>(p.B * p.C), static_cast<unsigned>(p.h));
  return OVSEG_LAUNCH(upsample_mask_loss_bwd_kernel<A>, grid, kPixelThreads, row, stream, p, counts);
}

template const char* upsample_mask_loss_on_device(const MaskLossParams<float>&, float*, void*);
template const char* upsample_mask_loss_on_device(const MaskLossParams<double>&, double*, void*);
template const char* upsample_mask_loss_backward_on_device(const MaskLossParams<float>&, float*, void*);
template const char* upsample_mask_loss_backward_on_device(const MaskLossParams<double>&, double*, void*);

}  // namespace ovseg
