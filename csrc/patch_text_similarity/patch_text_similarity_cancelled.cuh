// patch_text_similarity on CUDA: texts whose pooled vector has cancelled, as of u and -u, or of patches centred over n
// under nearly equal weights. Their |v|^2 is far below sum (a |u|)^2: neither the Gram form nor rounded weights have
// digits left for it. They are gathered, 64 of an image at a time, and v is computed from weights with all their
// digits. Equation numbers: ovseg_kernels/ops/patch_text_similarity.py.
#pragma once
#include "patch_text_similarity_fwd.cuh"

namespace ovseg {
namespace {

// The texts with rank 64 group and on among the marked ones of an image: their count, at most 64, and the list in
// shared memory, by rising text. `counts` has an element a thread.
__device__ inline int list_cancelled(const uint32_t* bits, int64_t words, int64_t group, int32_t* list,
                                     int32_t* counts) {
  const int64_t each = ceil_div(words, kThreads), first = threadIdx.x * each;
  const int64_t last = first + each < words ? first + each : words;
  int32_t mine = 0;
  for (int64_t k = first; k < last; ++k) mine += __popc(bits[k]);
  const int32_t total = block_sum<kThreads>(mine, counts), begin = static_cast<int32_t>(group * kTile);
  if (total <= begin) return 0;
  counts[threadIdx.x] = mine;
  __syncthreads();
  int32_t rank = -begin;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) rank += counts[thread];
  for (int64_t k = first; k < last; ++k) {
    for (uint32_t left = bits[k]; left; left &= left - 1, ++rank) {
      if (rank >= 0 && rank < kTile) list[rank] = static_cast<int32_t>(32 * k + __ffs(static_cast<int>(left)) - 1);
    }
  }
  __syncthreads();
  return total - begin < kTile ? total - begin : kTile;
}

// Elements of a block's v [64, D], kept from one window of patches to the next.
__host__ __device__ inline int64_t cancelled_scratch(int64_t D) { return round_up(D, kTile) * kTile; }

// Blocks share the groups of all images; where nothing has cancelled they leave at once. `scratch`: cancelled_scratch
// of each block, unused where N is one window.
template <typename K>
__global__ void __launch_bounds__(kThreads)
    patch_text_similarity_fwd_cancelled_kernel(Args<K> p, int64_t images, typename K::A* scratch) {
  using A = typename K::A;
  using P = typename K::Careful;
  OVSEG_DYNAMIC_SHARED(memory);
  A* sums = reinterpret_cast<A*>(memory);                  // [64][65], between products
  A* weights = reinterpret_cast<A*>(memory + kStages<A>);  // [64][kScorePitch]
  int32_t* list = reinterpret_cast<int32_t*>(weights + kTile * kScorePitch<A>);
  // Weights of at most 1 times this: the smaller parts of a float16 product stay normal numbers.
  constexpr A kUnit = 16384;
  if (*p.cancelled_blocks == 0) return;
  const int64_t groups = ceil_div(p.T, kTile);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 2;  // of v: two threads a row
  scratch += blockIdx.x * cancelled_scratch(p.D) + threadIdx.x;
  for (int64_t item = blockIdx.x; item < images * groups; item += gridDim.x) {
    const int64_t i = item % images, b = p.first + i;
    const int count = list_cancelled(p.cancelled + i * 2 * groups, 2 * groups, item / images, list, list + kTile);
    if (count == 0) continue;
    Listed<typename K::T, A> texts;
    static_cast<Operand<typename K::T, A>&>(texts) = p.text_rows();
    texts.rows = count, texts.list = list;
    const int64_t t = row < count ? list[row] : 0;
    const A longest = larger(p.longest[i], kEps<A>), unit = A(1) / longest;
    A acc[kAccumulators], squared = 0, dot = 0;
    for (int64_t w0 = 0; w0 < p.N; w0 += kWindow<A>) {
      const int64_t width = p.N - w0 < kWindow<A> ? p.N - w0 : kWindow<A>;
      for (int64_t n0 = 0; n0 < width; n0 += kTile) {
        clear<P>(acc);
        product<P>(texts, 0, p.patch_rows(i), w0 + n0, memory, acc);
#pragma unroll
        for (int k = 0; k < kAccumulators; ++k) {
          weights[tile_row<P>(k) * kScorePitch<A> + n0 + tile_column<P>(k)] = acc[k];
        }
      }
      __syncthreads();
      for (int r = threadIdx.x / 32; r < count; r += kThreads / 32) {
        A* w = weights + r * kScorePitch<A>;
        const A inverse = p.inverse_text(list[r]), lse = p.lse[b * p.T + list[r]];
        for (int64_t n = lane; n < round_up(width, 32); n += 32) {  // (2)
          const bool some = n < width && p.kept(b, w0 + n);
          w[n] = some ? kUnit * exp(p.logit(w[n] * p.inverse_norm(i, w0 + n) * inverse) - lse) : A(0);
        }
      }
      __syncthreads();
      const bool last = w0 + width == p.N;
      for (int64_t d0 = 0; d0 < p.D; d0 += kTile) {
        A* kept = scratch + d0 * kTile;  // [kAccumulators][kThreads]: each thread finds what it left there
#pragma unroll
        for (int k = 0; k < kAccumulators; ++k) acc[k] = w0 == 0 ? A(0) : kept[k * kThreads];
        product_resident<P>(weights, kScorePitch<A>, p.patch_columns(i, w0, width), d0, memory, acc);
        if (!last) {
#pragma unroll
          for (int k = 0; k < kAccumulators; ++k) kept[k * kThreads] = acc[k];
          continue;
        }
        store_tile<P>(acc, sums);
        __syncthreads();
        for (int64_t c = threadIdx.x % 2; c < kTile && d0 + c < p.D; c += 2) {
          const A v = sums[row * kTilePitch + c] * unit;
          squared += v * v;
          dot += v * to_float(p.texts[t * p.text_t + (d0 + c) * p.text_d]);
        }
        __syncthreads();
      }
    }
    squared += __shfl_xor_sync(kFullWarp, squared, 1), dot += __shfl_xor_sync(kFullWarp, dot, 1);
    if (row < count && threadIdx.x % 2 == 0) {
      const A norm = sqrt(squared) / kUnit * longest;
      p.norm[b * p.T + t] = norm;
      p.similarity[b * p.T + t] = dot / kUnit * p.inverse_text(t) * (longest / larger(norm, kEps<A>));  // (4)
    }
  }
}

// Two blocks on each multiprocessor of a large GPU: what nearly every call launches in vain stays small.
constexpr int64_t kCancelledBlocks = 264;

template <typename A>
constexpr int kCancelledShared =
    kStages<A> + kTile * kScorePitch<A> * static_cast<int>(sizeof(A)) + (kTile + kThreads) * 4;
static_assert(kCancelledShared<float> <= 99 * 1024 && kCancelledShared<double> <= 99 * 1024,
              "what a block of sm_86 to sm_120 has");

}  // namespace
}  // namespace ovseg
