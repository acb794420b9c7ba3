// upsample_argmax on CUDA: a block owns the pixels of one cell. It finds the classes that can win there, (3), keeps
// them in shared memory by rising class, and interpolates only those. Equation numbers:
// ovseg_kernels/ops/upsample_argmax.py.
#include "../common/device.cuh"
#include "upsample_argmax_cuda.h"

namespace ovseg {
namespace {

constexpr unsigned kThreads = 128;

template <typename A>
__device__ A weighted(A weight, A x) {  // a corner of weight zero does not count, be it infinite
  return weight == A(0) ? A(0) : weight * x;
}

// The first output at or after which the lower sample is at least `sample`.
template <typename A>
__device__ int64_t first_output(int64_t sample, int64_t samples, int64_t outputs) {
  int64_t at = sample * outputs / samples - 2;
  if (at < 0) at = 0;
  while (at < outputs && between<A>(at, samples, outputs).low < sample) ++at;
  return at;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) upsample_argmax_fwd_kernel(UpsampleParams<A> p) {
  OVSEG_DYNAMIC_SHARED(memory);
  A* floors = reinterpret_cast<A*>(memory);                         // [kThreads]
  int32_t* counts = reinterpret_cast<int32_t*>(floors + kThreads);  // [kThreads + 1]
  int32_t* list = counts + kThreads + 1;                            // [C]
  const int64_t x = blockIdx.x, y = blockIdx.y, b = blockIdx.z;
  const int64_t X0 = first_output<A>(x, p.w, p.W), X1 = first_output<A>(x + 1, p.w, p.W);
  const int64_t Y0 = first_output<A>(y, p.h, p.H), Y1 = first_output<A>(y + 1, p.h, p.H);
  if (X0 >= X1 || Y0 >= Y1) return;  // of the whole block
  const int64_t right = x + 1 < p.w ? x + 1 : x, below = y + 1 < p.h ? y + 1 : y;
  const A* image = p.logits + b * p.C * p.h * p.w;
  auto corner = [&](int64_t c, int64_t row, int64_t column) { return image[(c * p.h + row) * p.w + column]; };
  // Each thread takes neighbouring classes, so that the list comes out by rising class.
  const int64_t each = ceil_div(p.C, kThreads), c0 = threadIdx.x * each, c1 = c0 + each < p.C ? c0 + each : p.C;
  A floor = minus_infinity<A>();
  for (int64_t c = c0; c < c1; ++c) {
    const A least =
        fmin(fmin(corner(c, y, x), corner(c, y, right)), fmin(corner(c, below, x), corner(c, below, right)));
    floor = larger(least + (p.bias ? p.bias[c] : A(0)), floor);
  }
  floors[threadIdx.x] = floor;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) floors[threadIdx.x] = larger(floors[threadIdx.x + half], floors[threadIdx.x]);
    __syncthreads();
  }
  floor = floors[0];
  auto candidate = [&](int64_t c) {
    const A most = fmax(fmax(corner(c, y, x), corner(c, y, right)), fmax(corner(c, below, x), corner(c, below, right)));
    return most + (p.bias ? p.bias[c] : A(0)) >= floor;
  };
  int32_t mine = 0;
  for (int64_t c = c0; c < c1; ++c) mine += candidate(c) ? 1 : 0;
  counts[threadIdx.x + 1] = mine;
  if (threadIdx.x == 0) counts[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned t = 0; t < kThreads; ++t) counts[t + 1] += counts[t];
  }
  __syncthreads();
  int32_t at = counts[threadIdx.x];
  for (int64_t c = c0; c < c1; ++c) {
    if (candidate(c)) list[at++] = static_cast<int32_t>(c);
  }
  __syncthreads();
  const int32_t count = counts[kThreads];
  for (int64_t i = threadIdx.x; i < (X1 - X0) * (Y1 - Y0); i += kThreads) {
    const int64_t Y = Y0 + i / (X1 - X0), X = X0 + i % (X1 - X0);
    const Between<A> v = between<A>(Y, p.h, p.H), u = between<A>(X, p.w, p.W);
    A best = minus_infinity<A>();
    int64_t winner = list[0];
    for (int32_t k = 0; k < count; ++k) {
      const int64_t c = list[k];
      const A left = weighted(v.to_low, corner(c, y, x)) + weighted(v.to_high, corner(c, below, x));
      const A other = weighted(v.to_low, corner(c, y, right)) + weighted(v.to_high, corner(c, below, right));
      const A value = weighted(u.to_low, left) + weighted(u.to_high, other) + (p.bias ? p.bias[c] : A(0));
      if (k == 0 || value > best) best = value, winner = c;
    }
    const int64_t out = (b * p.H + Y) * p.W + X, label = label_of(p, winner, best);
    if (p.type == LabelType::int64) static_cast<int64_t*>(p.out)[out] = label;
    if (p.type == LabelType::int16) static_cast<int16_t*>(p.out)[out] = static_cast<int16_t>(label);
    if (p.type == LabelType::uint8) static_cast<uint8_t*>(p.out)[out] = static_cast<uint8_t>(label);
    if (p.value) p.value[out] = best;
  }
}

}  // namespace

template <typename A>
const char* upsample_argmax_on_device(const UpsampleParams<A>& p, void* stream) {
  const size_t shared = kThreads * sizeof(A) + (kThreads + 1 + p.C) * sizeof(int32_t);
  if (shared > 96 * 1024) return "more than 23000 classes; use OVSEG_BACKEND=reference";
  if (p.h > 65535 || p.B > 65535) return "more than 65535 rows of samples or images; use OVSEG_BACKEND=reference";
  if (p.B == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.w), static_cast<unsigned>(p.h), static_cast<unsigned>(p.B));
  return OVSEG_LAUNCH(upsample_argmax_fwd_kernel<A>, grid, kThreads, shared, stream, p);
}

template const char* upsample_argmax_on_device(const UpsampleParams<float>&, void*);
template const char* upsample_argmax_on_device(const UpsampleParams<double>&, void*);

}  // namespace ovseg
