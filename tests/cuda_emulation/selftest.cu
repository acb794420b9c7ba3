// Kernels that test the emulation itself, the mma and cp.async wrappers and Philox. nvcc compiles this file too.
#include "../../csrc/common/block.cuh"
#include "../../csrc/common/philox.h"
#include "../../csrc/common/row_statistics.cuh"
#include "../../csrc/common/tile.cuh"
#include "selftest.h"

namespace ovseg::selftest {
namespace {

// y = reversed x within each block, through shared memory. Wrong without its barrier.
template <bool barrier>
__global__ void reverse_kernel(const float* x, float* y) {
  __shared__ float line[128];
  line[threadIdx.x] = x[blockIdx.x * 128 + threadIdx.x];
  if (barrier) __syncthreads();
  y[blockIdx.x * 128 + threadIdx.x] = line[127 - threadIdx.x];
}

// Sum of 128 numbers by a tree in dynamic shared memory. `race` updates the line in place while neighbours read it.
template <bool race>
__global__ void tree_kernel(const float* x, float* y) {
  OVSEG_DYNAMIC_SHARED(memory);
  float* line = reinterpret_cast<float*>(memory);
  line[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int step = 1; step < 128; step *= 2) {
    const float other = threadIdx.x + step < 128 ? line[threadIdx.x + step] : 0.0f;
    if (!race) __syncthreads();
    line[threadIdx.x] += other;
    __syncthreads();
  }
  if (threadIdx.x == 0) *y = line[0];
}

// Per warp: sum by shuffles, lanes above zero by vote, value of lane 5, difference to the next lane; and a histogram.
__global__ void warp_kernel(const float* x, float* y, float* counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float value = x[threadIdx.x];
  const float sum = warp_sum(value), top = warp_max(value), fifth = __shfl_sync(kFullWarp, value, 5);
  const float next = __shfl_down_sync(kFullWarp, value, 1);
  const unsigned votes = __ballot_sync(kFullWarp, value > 0);
  const int any = __any_sync(kFullWarp, value > 2), all = __all_sync(kFullWarp, value > -9);
  if (lane == 0) {
    float* out = y + warp * 7;
    out[0] = sum, out[1] = static_cast<float>(votes & 0xffff), out[2] = static_cast<float>(votes >> 16), out[3] = fifth;
    out[4] = next, out[5] = static_cast<float>(any + 2 * all), out[6] = top;
  }
  atomicAdd(&counts[value > 0], 1.0f);
}

// The block reductions, twice each with the same shared memory: sum, largest, three sums at once, and log-sum-exps of
// the threads that are four apart.
__global__ void block_kernel(const float* x, float* y) {
  OVSEG_DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const float value = x[threadIdx.x];
  const float sum = block_sum<128>(value, shared), top = block_max<128>(value, shared);
  float three[3] = {value, 2 * value, value * value};
  block_sum<128>(three, shared);
  RowStatistics<float> mine;
  mine.clear();
  mine.add(value, value > 0);
  const auto all = block_merge<128, 4>(mine, reinterpret_cast<RowStatistics<float>*>(memory));
  float* out = y + 8 * threadIdx.x;
  out[0] = sum, out[1] = top, out[2] = three[0], out[3] = three[1], out[4] = three[2];
  out[5] = all.log_sum_exp(), out[6] = all.hits, out[7] = all.positives;
}

__global__ void out_of_bounds_kernel(float* y, int64_t index, bool shared) {
  OVSEG_DYNAMIC_SHARED(memory);
  float* line = shared ? reinterpret_cast<float*>(memory) : y;
  if (blockIdx.x == 1 && threadIdx.x == 3) line[index] = 1;
}

__global__ void divergent_kernel(int kind, float* y) {
  if (kind == 0 && threadIdx.x < 64) return;  // half of the block leaves before the barrier
  if (kind == 1 && threadIdx.x < 64) {        // two halves wait at two barriers
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (kind == 2 && threadIdx.x != 7) __syncwarp();  // one lane misses
  y[threadIdx.x] = 1;
}

// C [64, 64] = A [64, K] B [64, K]^T: the tile product, with operands of any strides.
template <typename P, typename T>
__global__ void __launch_bounds__(kThreads)
    product_kernel(Operand<T, typename P::Sum> a, Operand<T, typename P::Sum> b, typename P::Sum* c) {
  OVSEG_DYNAMIC_SHARED(memory);
  typename P::Sum acc[kAccumulators];
  clear<P>(acc);
  ovseg::product<P>(a, 0, b, 0, memory, acc);
  for (int i = 0; i < kAccumulators; ++i) c[tile_row<P>(i) * kTile + tile_column<P>(i)] = acc[i];
}

// The same with A [64, K] contiguous, and first in shared memory.
constexpr int kResidentPitch = 164;
template <typename P, typename TA, typename TB>
__global__ void __launch_bounds__(kThreads)
    resident_kernel(const TA* a, Operand<TB, typename P::Sum> b, typename P::Sum* c) {
  OVSEG_DYNAMIC_SHARED(memory);
  TA* resident = reinterpret_cast<TA*>(memory + kStageBytes);
  for (int i = threadIdx.x; i < kTile * kResidentPitch; i += kThreads) {
    const int row = i / kResidentPitch, k = i % kResidentPitch;
    resident[i] = k < b.depth ? a[row * b.depth + k] : TA(0);
  }
  __syncthreads();
  typename P::Sum acc[kAccumulators];
  clear<P>(acc);
  product_resident<P>(resident, kResidentPitch, b, 0, memory, acc);
  for (int i = 0; i < kAccumulators; ++i) c[tile_row<P>(i) * kTile + tile_column<P>(i)] = acc[i];
}

// Copies a line by cp.async; `early` reads it before it has arrived.
template <bool early>
__global__ void copy_kernel(const float* x, float* y, int valid) {
  OVSEG_DYNAMIC_SHARED(memory);
  float* line = reinterpret_cast<float*>(memory);
  copy_async(line + 4 * threadIdx.x, x + 4 * threadIdx.x, valid);
  commit_copies();
  if (early) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = line[4 * (31 - threadIdx.x) + i];
}

__global__ void philox_kernel(const int64_t* rng, int64_t first, int64_t count, float* bits_low, float* bits_high,
                              float* gumbel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i >= count) return;
  const uint32_t bits = philox_bits(rng[0], rng[1], first + i);
  bits_low[i] = static_cast<float>(bits & 0xffff), bits_high[i] = static_cast<float>(bits >> 16);
  gumbel[i] = gumbel_from_bits(bits);
}

template <typename P, typename T>
const char* run_product(const void* a, const void* b, void* c, int64_t depth, bool a_by_k, bool b_by_k, int64_t pitch) {
  using A = typename P::Sum;
  const Operand<T, A> x = {static_cast<const T*>(a), a_by_k ? 1 : pitch, a_by_k ? kTile : 1, kTile, depth};
  const Operand<T, A> y = {static_cast<const T*>(b), b_by_k ? 1 : pitch, b_by_k ? kTile : 1, kTile, depth};
  return OVSEG_LAUNCH((product_kernel<P, T>), 1, kThreads, kStageBytes, nullptr, x, y, static_cast<A*>(c));
}

template <typename P, typename TA, typename TB>
const char* run_resident(const void* a, const void* b, void* c, int64_t depth, bool b_by_k, int64_t pitch) {
  using A = typename P::Sum;
  const Operand<TB, A> y = {static_cast<const TB*>(b), b_by_k ? 1 : pitch, b_by_k ? kTile : 1, kTile, depth};
  const size_t shared = kStageBytes + kTile * kResidentPitch * sizeof(TA);
  return OVSEG_LAUNCH((resident_kernel<P, TA, TB>), 1, kThreads, shared, nullptr, static_cast<const TA*>(a), y,
                      static_cast<A*>(c));
}

}  // namespace

const char* reverse(const float* x, float* y, int blocks, bool barrier) {
  const dim3 grid(blocks);
  return barrier ? OVSEG_LAUNCH(reverse_kernel<true>, grid, 128, 0, nullptr, x, y)
                 : OVSEG_LAUNCH(reverse_kernel<false>, grid, 128, 0, nullptr, x, y);
}
const char* tree(const float* x, float* y, bool race) {
  return race ? OVSEG_LAUNCH(tree_kernel<true>, 1, 128, 512, nullptr, x, y)
              : OVSEG_LAUNCH(tree_kernel<false>, 1, 128, 512, nullptr, x, y);
}
const char* warps(const float* x, float* y, float* counts) {
  return OVSEG_LAUNCH(warp_kernel, 1, 128, 0, nullptr, x, y, counts);
}
const char* blocks(const float* x, float* y) {
  return OVSEG_LAUNCH(block_kernel, 1, 128, 128 * sizeof(RowStatistics<float>), nullptr, x, y);
}
const char* out_of_bounds(float* y, int64_t index, bool shared) {
  return OVSEG_LAUNCH(out_of_bounds_kernel, 2, 32, 256, nullptr, y, index, shared);
}
const char* divergent(int kind, float* y) { return OVSEG_LAUNCH(divergent_kernel, 1, 128, 0, nullptr, kind, y); }
const char* copies(const float* x, float* y, int valid, bool early) {
  return early ? OVSEG_LAUNCH(copy_kernel<true>, 1, 32, 512, nullptr, x, y, valid)
               : OVSEG_LAUNCH(copy_kernel<false>, 1, 32, 512, nullptr, x, y, valid);
}
const char* product(int kind, const void* a, const void* b, void* c, int64_t depth, bool a_by_k, bool b_by_k,
                    int64_t pitch) {
  switch (kind) {
    case 0:
      return run_product<Exact<float>, float>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 1:
      return run_product<Exact<double>, double>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 2:
      return run_product<Tf32, float>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 3:
      return run_product<Mma16<half>, half>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 4:
      return run_product<Mma16<bfloat16>, bfloat16>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 6:
      return run_product<Tf32Twice, float>(a, b, c, depth, a_by_k, b_by_k, pitch);
    case 7:
      return run_resident<Exact<float>, float, float>(a, b, c, depth, b_by_k, pitch);
    case 8:
      return run_resident<Tf32Twice, float, float>(a, b, c, depth, b_by_k, pitch);
    case 9:
      return run_resident<Mma16<half>, float, half>(a, b, c, depth, b_by_k, pitch);
    case 10:
      return run_resident<Mma16<bfloat16>, float, bfloat16>(a, b, c, depth, b_by_k, pitch);
    default:  // float16 in memory, tf32 in the product
      return run_product<Tf32, half>(a, b, c, depth, a_by_k, b_by_k, pitch);
  }
}
const char* philox_numbers(const int64_t* rng, int64_t first, int64_t count, float* low, float* high, float* gumbel) {
  const dim3 grid(static_cast<unsigned>(ceil_div(count, 128)));
  return OVSEG_LAUNCH(philox_kernel, grid, 128, 0, nullptr, rng, first, count, low, high, gumbel);
}

}  // namespace ovseg::selftest
