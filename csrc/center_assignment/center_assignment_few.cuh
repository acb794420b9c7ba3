// center_assignment with at most eight centers: one kernel forward and one backward, in which every token is read once.
//
// A block walks consecutive tokens of one image, a tile at a time. Asynchronous copies bring the next tile while this
// one is worked on: scores, their softmax with a thread for each token and center, then the sums of all centers from
// the same shared memory, in registers to the end. 16-bit tokens meet the centers on the n = 8 of mma; products with
// float factors (soft weights, d scores, d pooled) are tf32, in which 16-bit numbers and a one-hot are exact. Where
// images are few, several blocks share the tokens of one, and their sums are added in order.
#pragma once
#include "center_assignment_args.cuh"

namespace ovseg {
namespace {

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;
constexpr int kFewSums = 32;  // of each thread: kFewCenters x kFewChannels of a block
constexpr int kFewSlots = 2;
// Blocks on an SM for which the backward of 16-bit tokens leaves registers: at 768 channels the shared memory of sm_80
// holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kFewBackward = 1;
#else
constexpr int kFewBackward = 2;
#endif

template <typename K>
struct FewArgs : CenterArgs<K> {
  using A = typename K::A;
  FewPlan plan;
  bool whole_keys, whole_values;  // rows are pieces of 16 bytes at multiples of 16
  bool whole_d_keys, whole_d_values;
};

// Tokens of an image that a block walks, and the shared memory in which it does.
template <typename K>
struct FewBlock {
  using A = typename K::A;
  using T = typename K::T;
  static constexpr int kTokens = few_tokens(sizeof(T));
  static constexpr int kPairs = kTokens * kFewCenters;             // of a token and a center
  static constexpr int kParts = K::Score::tensor ? kFewWarps : 1;  // of a product: warps share its depth

  const FewArgs<K>& x;
  int b, begin, end;  // tokens
  T *slots, *queries;
  A *partial, *weights;  // [2, kParts, kPairs] and [2, kPairs]
  A *scaled, *rho;       // [8, scaled_pitch] and [8], backward only
  int piece = 0;         // that arrives next

  __device__ FewBlock(const FewArgs<K>& args, unsigned char* memory) : x(args) {
    const FewPlan& plan = x.plan;
    b = blockIdx.x / plan.splits, begin = blockIdx.x % plan.splits * plan.tokens;
    end = begin + plan.tokens < x.p.L ? begin + plan.tokens : static_cast<int>(x.p.L);
    slots = reinterpret_cast<T*>(memory);
    queries = slots + kFewSlots * kTokens * plan.pitch;
    partial = reinterpret_cast<A*>(queries + kFewCenters * plan.pitch);
    weights = partial + 2 * kParts * kPairs;
    scaled = weights + 2 * kPairs, rho = scaled + kFewCenters * plan.scaled_pitch;
  }

  __device__ T* slot(int i) const { return slots + i % kFewSlots * kTokens * x.plan.pitch; }

  // Rows l0 .. of an image into shared memory; zero where masked, past the end, and up to a multiple of 16 channels.
  __device__ void fill(T* to, const T* from, const int64_t (&strides)[3], int l0, int rows, int count, int width,
                       const bool* keep, bool whole) const {
    constexpr int kPart = 16 / sizeof(T);
    const int padded = (width + 15) / 16 * 16, lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < count; row += kFewWarps) {
      const int64_t l = l0 + row;
      const bool any = l < rows && (!keep || keep[l * x.p.mask_strides[1]]);
      T* shared = to + row * x.plan.pitch;
      const T* global = from + (any ? l * strides[1] : 0);
      if (whole) {
        for (int i = lane * kPart; i < padded; i += 32 * kPart) {
          const bool inside = any && i < width;
          copy_async(shared + i, inside ? global + i : from, inside ? 16 : 0);
        }
      } else {
        for (int i = lane; i < padded; i += 32) {
          shared[i] = any && i < width ? global[i * strides[2]] : from_float<T>(0.0f);
        }
      }
    }
  }

  // Starts the copies of a piece: the keys of a tile, and its values where they are another tensor.
  __device__ void start(int i) const {
    const int per = x.plan.same ? 1 : 2, l0 = begin + i / per * kTokens;
    if (l0 < end) {
      if (i % per == 0) {
        fill(slot(i), x.key(b), x.p.key_strides, l0, end, kTokens, x.p.D, x.keep_of(b), x.whole_keys);
      } else {
        fill(slot(i), x.value(b), x.p.value_strides, l0, end, kTokens, x.p.E, x.keep_of(b), x.whole_values);
      }
    }
    commit_copies();
  }
  __device__ void start_first() {
    fill(queries, x.query(b), x.p.query_strides, 0, x.p.G, kFewCenters, x.p.D, nullptr, false);
    start(0);
  }
  // The next piece, as soon as it is there and all threads are done with the one before, whose memory the piece after
  // it may then have.
  __device__ const T* next(bool start_another) {
    wait_copies<0>();
    __syncthreads();
    if (start_another) start(piece + 1);
    return slot(piece++);
  }

  // partial = products of all tokens of a tile with all centers, rows of X `pitch` apart.
  template <typename X>
  __device__ void scores(const T* tile, const X* centers, int pitch, int width, A* out) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (K::Score::tensor) {
      const int group = lane / 4, pair = lane % 4 * 2, depth = (width + 15) / 16 * 16;
      float c[4] = {};
#pragma unroll 2
      for (int k = 16 * warp; k < depth; k += 16 * kFewWarps) {
        FragmentA a;
        load_matrices<false>(a.x, tile + lane % 16 * x.plan.pitch + k + lane / 16 * 8);
        const X* row = centers + group * pitch + k + pair;
        if constexpr (std::is_same_v<X, T>) {
          const FragmentB f = {{*reinterpret_cast<const uint32_t*>(row), *reinterpret_cast<const uint32_t*>(row + 8)}};
          mma<T>(c, a, f);
        } else {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const auto two = *reinterpret_cast<const Pack<float, 2>*>(row + 8 * part);
            mma<float>(c, widened(a, part), rounded(two.x[0], two.x[1]));
          }
        }
      }
      A* at = out + warp * kPairs + group * kFewCenters + pair;
      at[0] = c[0], at[1] = c[1];
      at[8 * kFewCenters] = c[2], at[8 * kFewCenters + 1] = c[3];
    } else {
      if (warp >= kTokens) return;
      A sums[kFewCenters] = {};
      const int depth = (width + 3) / 4 * 4;
#pragma unroll 1
      for (int k = 4 * lane; k < depth; k += 128) {
        const auto v = *reinterpret_cast<const Pack<A, 4>*>(tile + warp * x.plan.pitch + k);
#pragma unroll
        for (int g = 0; g < kFewCenters; ++g) {
          const auto q = *reinterpret_cast<const Pack<A, 4>*>(centers + g * pitch + k);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[g] += v.x[j] * q.x[j];
        }
      }
#pragma unroll
      for (int g = 0; g < kFewCenters; ++g) {
        sums[g] = warp_sum(sums[g]);
        if (lane == g) out[warp * kFewCenters + g] = sums[g];
      }
    }
  }
  // One of those products, from the parts of all warps in order.
  __device__ A product_of(const A* parts, int pair) const {
    A sum = parts[pair];
#pragma unroll
    for (int part = 1; part < kParts; ++part) sum += parts[part * kPairs + pair];
    return sum;
  }

  // d pooled / n and rho / n of all centers into shared memory, a warp a center.
  __device__ void scale_upstream() const {
    const int g = threadIdx.x / 32, padded = static_cast<int>(round_up(x.p.E, 16));
    A* row = scaled + g * x.plan.scaled_pitch;
    const A mine = g < x.p.G ? x.scale_upstream(b * x.p.G + g, row) : A(0);
    for (int e = threadIdx.x % 32 + (g < x.p.G ? static_cast<int>(x.p.E) : 0); e < padded; e += 32) row[e] = 0;
    if (threadIdx.x % 32 == 0) rho[g] = mine;
  }

  // The fragments of m16n8k8 that half of a 16 x 16 block is: its k runs over the low elements of four words and then
  // over the high ones, and so does k of what it is multiplied by.
  __device__ static FragmentA widened(const FragmentA& a, int part) {
    FragmentA out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.x[i] = bits_of(half_of<T>(a.x[2 * part + i % 2], i / 2));
    return out;
  }
  __device__ static FragmentB rounded(float first, float second) {
    return {{bits_of(round_tf32(first)), bits_of(round_tf32(second))}};
  }

  // sums[g, channel] += weights[token, g] tile[token, channel]; which sums a thread has: channel_of and center_of.
  // Weights that are 0, 1 or NaN are `plain`: they are what 16 bits hold.
  __device__ void pool(const T* tile, const A* weight, bool plain, int width, A (&sums)[kFewSums]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (K::Score::tensor) {
      FragmentB factors[2], whole;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const A* at = weight + (8 * part + lane % 4 * 2) * kFewCenters + lane / 4;
        factors[part] = rounded(at[0], at[kFewCenters]);
        const Pack<T, 2> pair = {{from_float<T>(at[0]), from_float<T>(at[kFewCenters])}};
        whole.x[part] = *reinterpret_cast<const uint32_t*>(&pair);
      }
#pragma unroll
      for (int i = 0; i < kFewSums / 4; ++i) {
        const int channel = 16 * (warp + kFewWarps * i);
        if (channel >= width) break;
        FragmentA a;
        load_matrices<true>(a.x, tile + (lane % 8 + lane / 16 * 8) * x.plan.pitch + channel + lane / 8 % 2 * 8);
        float (&c)[4] = *reinterpret_cast<float (*)[4]>(sums + 4 * i);
        if (plain) {
          mma<T>(c, a, whole);
        } else {
#pragma unroll
          for (int part = 0; part < 2; ++part) mma<float>(c, widened(a, part), factors[part]);
        }
      }
    } else {
      const int channel = 4 * threadIdx.x;
      if (channel >= width) return;
#pragma unroll 1
      for (int token = 0; token < kTokens; ++token) {
        const auto v = *reinterpret_cast<const Pack<A, 4>*>(tile + token * x.plan.pitch + channel);
#pragma unroll
        for (int g = 0; g < kFewCenters; ++g) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[4 * g + j] += weight[token * kFewCenters + g] * v.x[j];
        }
      }
    }
  }
  __device__ static int channel_of(int i) {
    if constexpr (!K::Score::tensor) return 4 * threadIdx.x + i % 4;
    return 16 * (threadIdx.x / 32 + kFewWarps * (i / 4)) + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
  }
  __device__ static int center_of(int i) {
    if constexpr (!K::Score::tensor) return i / 4;
    return threadIdx.x % 4 * 2 + i % 2;
  }

  // rows[token, channel] += weights[token, g] centers[g, channel], in the registers of `spread` below.
  template <typename X>
  __device__ void add_spread(const X* centers, int pitch, const A* weight, int channel, A (&rows)[kFewSums]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (K::Score::tensor) {
      const int group = lane / 4, t = lane % 4;
      FragmentA a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a.x[i] = bits_of(round_tf32(weight[(group + i % 2 * 8) * kFewCenters + t + i / 2 * 4]));
      }
      // Column n of product j is channel 8 (n / 2) + 2 j + n % 2: a thread then ends with eight neighbours.
      constexpr int kLoad = 16 / sizeof(X);
#pragma unroll
      for (int first = 0; first < 8; first += kLoad) {
        const X* at = centers + t * pitch + channel + group / 2 * 8 + first;
        const auto low = *reinterpret_cast<const Pack<X, kLoad>*>(at);
        const auto high = *reinterpret_cast<const Pack<X, kLoad>*>(at + 4 * pitch);
#pragma unroll
        for (int i = 0; i < kLoad; i += 2) {
          const float one = to_float(group % 2 ? low.x[i + 1] : low.x[i]);
          const float other = to_float(group % 2 ? high.x[i + 1] : high.x[i]);
          float (&c)[4] = *reinterpret_cast<float (*)[4]>(rows + 2 * (first + i));
          mma<float>(c, a, rounded(one, other));
          if constexpr (std::is_same_v<X, float>) {  // the digits that tf32 leaves out
            mma<float>(c, a, rounded(one - round_tf32(one), other - round_tf32(other)));
          }
        }
      }
    } else {
      Pack<A, 4> values[kFewCenters];
#pragma unroll
      for (int g = 0; g < kFewCenters; ++g) {
        values[g] = *reinterpret_cast<const Pack<A, 4>*>(centers + g * pitch + channel);
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
#pragma unroll
        for (int g = 0; g < kFewCenters; ++g) {
#pragma unroll
          for (int j = 0; j < 4; ++j) rows[4 * token + j] += weight[token * kFewCenters + g] * values[g].x[j];
        }
      }
    }
  }
  // Writes to the tokens from l0 on what add(channel, registers) adds up, 16 bytes at a time where rows are `whole`.
  template <typename Add>
  __device__ void spread(T* out, int l0, int width, bool whole, const Add& add) const {
    constexpr int kNear = K::Score::tensor ? 8 : 4, kRows = kFewSums / kNear;  // channels and tokens of a thread
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = K::Score::tensor ? 32 * warp : 4 * static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int channel = first; channel < width; channel += kNear * (K::Score::tensor ? 4 * kFewWarps : kFewThreads)) {
      A rows[kFewSums] = {};
      add(channel, rows);
#pragma unroll
      for (int row = 0; row < (K::Score::tensor ? 2 : kRows); ++row) {
        const int l = l0 + (K::Score::tensor ? lane / 4 + 8 * row : row);
        const int at = channel + (K::Score::tensor ? lane % 4 * 8 : 0);
        if (l >= end || at >= width || (!K::Score::tensor && row >= kTokens)) continue;
        Pack<T, kNear> values;
#pragma unroll
        for (int j = 0; j < kNear; ++j) {
          values.x[j] = from_float<T>(rows[K::Score::tensor ? j / 2 * 4 + 2 * row + j % 2 : 4 * row + j]);
        }
        T* to = out + (b * x.p.L + l) * width + at;
        if (whole) {
          *reinterpret_cast<Pack<T, kNear>*>(to) = values;
        } else {
          for (int j = 0; j < kNear && at + j < width; ++j) to[j] = values.x[j];
        }
      }
    }
  }
};

// Over the eight lanes of a token.
template <typename A>
__device__ inline A centers_sum(A x) {
#pragma unroll
  for (int other = 4; other > 0; other /= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}
// Softmax of y over the first G of eight lanes, 0 in the others; `best` becomes the first center that is largest.
template <typename A>
__device__ inline A centers_softmax(A y, int g, int64_t G, int& best) {
  A top = g < G ? y : minus_infinity<A>();
  best = g;
#pragma unroll
  for (int other = 4; other > 0; other /= 2) {
    const A value = __shfl_xor_sync(kFullWarp, top, other);
    const int at = __shfl_xor_sync(kFullWarp, best, other);
    const bool equal = value == top || (value != value && top != top);
    if (value > top || (value != value && top == top) || (equal && at < best)) top = value, best = at;
  }
  const A e = g < G ? exp(y - top) : A(0), sum = centers_sum(e);
  return g < G ? e / sum : A(0);
}

// A token and a center, and the weights of (2) and (5) that a thread finds for them.
template <typename K>
struct FewPair {
  using A = typename K::A;
  int g, best, l;
  bool inside, keep;  // of the tokens and centers that there are
  A z, soft, plain;   // (1), (2) and, where it is wanted, (5)

  __device__ FewPair(const FewBlock<K>& block, int l0, A raw, bool want_plain) {
    const FewArgs<K>& x = block.x;
    g = threadIdx.x % kFewCenters, l = l0 + threadIdx.x / kFewCenters;
    inside = l < block.end && g < x.p.G;
    keep = inside && x.kept(block.b, l);
    z = keep ? x.score(block.b, g, l, raw) : A(0);
    if (want_plain) plain = centers_softmax(z, g, x.p.G, best);
    soft = centers_softmax((z + (keep ? x.noise(block.b, g, l) : A(0))) / x.p.tau, g, x.p.G, best);
  }
  // The weight (3) of this center where `winner` is the token's: straight through, NaN where the softmax is.
  __device__ A weight(bool hard, int64_t winner) const {
    if (!keep) return 0;
    return hard ? (g == winner ? A(1) : A(0)) + (soft - soft) : soft;
  }
};

// The sums that the threads of each center have kept, added token by token; all threads must call.
template <typename K>
__device__ typename K::A centers_total(const FewBlock<K>& block, typename K::A mine) {
  __syncthreads();
  if (threadIdx.x < FewBlock<K>::kPairs) block.partial[threadIdx.x] = mine;
  __syncthreads();
  typename K::A total = 0;
  for (int token = 0; token < FewBlock<K>::kTokens; ++token) {
    total += block.partial[token * kFewCenters + threadIdx.x % kFewCenters];
  }
  return total;
}

template <typename K>
__global__ void __launch_bounds__(kFewThreads, 2) center_assignment_fwd_few_kernel(FewArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  FewBlock<K> block(x, memory);
  const CenterParams<A>& p = x.p;
  const int64_t b = block.b;
  A sums[kFewSums] = {}, count = 0;
  block.start_first();
  for (int l0 = block.begin; l0 < block.end; l0 += block.kTokens) {
    const auto* keys = block.next(true);
    block.scores(keys, block.queries, x.plan.pitch, p.D, block.partial);
    __syncthreads();
    if (threadIdx.x < block.kPairs) {
      const FewPair<K> pair(block, l0, block.product_of(block.partial, threadIdx.x), p.soft != nullptr);
      if (pair.inside && p.soft) p.soft[(b * p.G + pair.g) * p.L + pair.l] = pair.keep ? pair.plain : A(0);
      if (pair.inside && pair.g == 0) p.index[b * p.L + pair.l] = pair.keep ? pair.best : -1;
      block.weights[threadIdx.x] = pair.weight(p.hard, pair.best);
      count += block.weights[threadIdx.x];
    }
    __syncthreads();
    block.pool(x.plan.same ? keys : block.next(true), block.weights, p.hard, p.E, sums);
  }
  const A total = centers_total(block, count);
  if (threadIdx.x < p.G) {
    block.weights[threadIdx.x] = total;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * p.G + threadIdx.x;
    (x.plan.splits > 1 ? x.counts : p.count)[part] = total;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kFewSums; ++i) {
    const int64_t g = block.center_of(i), e = block.channel_of(i);
    if (g >= p.G || e >= p.E) continue;
    if (x.plan.splits > 1) {
      x.sums[(static_cast<int64_t>(blockIdx.x) * p.G + g) * p.E + e] = sums[i];
    } else {
      p.pooled[(b * p.G + g) * p.E + e] = sums[i] / x.divisor(block.weights[g]);  // (5)
    }
  }
}

// Sum of the parts of an image in order, of element e of center i = (b, g).
template <typename A>
__device__ inline A merged(const A* parts, int64_t splits, int64_t i, int64_t G, int64_t width, int64_t e) {
  A sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += parts[((i / G * splits + split) * G + i % G) * width + e];
  return sum;
}

// A block a center of an image.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_fwd_merge_kernel(FewArgs<K> x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  const int64_t i = blockIdx.x;
  const A count = merged(x.counts, x.plan.splits, i, p.G, 1, 0), divisor = x.divisor(count);
  if (threadIdx.x == 0) p.count[i] = count;
  for (int64_t e = threadIdx.x; e < p.E; e += kThreads) {
    p.pooled[i * p.E + e] = merged(x.sums, x.plan.splits, i, p.G, p.E, e) / divisor;
  }
}

template <typename K>
__global__ void __launch_bounds__(kFewThreads, K::Score::tensor ? kFewBackward : 1)
    center_assignment_bwd_few_kernel(FewArgs<K> x) {
  using A = typename K::A;
  using T = typename K::T;
  OVSEG_DYNAMIC_SHARED(memory);
  FewBlock<K> block(x, memory);
  const CenterParams<A>& p = x.p;
  const FewPlan& plan = x.plan;
  const int64_t b = block.b;
  A *products = block.partial + block.kParts * block.kPairs, *weights = block.weights, *dz = weights + block.kPairs;
  A sums[kFewSums] = {}, bias = 0;
  block.start_first();
  block.scale_upstream();
  for (int l0 = block.begin; l0 < block.end; l0 += block.kTokens) {
    const T* keys = block.next(true);
    const T* values = plan.same ? keys : block.next(false);  // both stay until their tile is done
    block.scores(keys, block.queries, plan.pitch, p.D, block.partial);
    block.scores(values, block.scaled, plan.scaled_pitch, p.E, products);
    __syncthreads();
    if (threadIdx.x < block.kPairs) {
      const A raw = block.product_of(block.partial, threadIdx.x);
      const FewPair<K> pair(block, l0, raw, p.grad_soft != nullptr);
      const int64_t l = pair.l, g = pair.g;
      const A ds = pair.keep ? block.product_of(products, threadIdx.x) - block.rho[g] : A(0);  // (6)
      A d = pair.soft * (ds - centers_sum(pair.soft * ds)) / p.tau;                            // (7)
      if (p.grad_soft) {
        const A upstream = pair.keep ? p.grad_soft[(b * p.G + g) * p.L + l] : A(0);
        d += pair.plain * (upstream - centers_sum(pair.plain * upstream));
      }
      if (!pair.keep) d = 0;
      bias += d;
      const A with_raw = centers_sum(pair.keep ? d * raw : A(0));
      if (p.grad_scale && pair.inside && g == 0) p.grad_scale[b * p.L + l] = p.scale * with_raw;  // (10)
      dz[threadIdx.x] = pair.keep ? d * x.factor(b, l) : A(0);
      weights[threadIdx.x] = pair.weight(p.hard, pair.keep ? p.index[b * p.L + l] : -1);
    }
    __syncthreads();
    if (p.grad_queries) block.pool(keys, dz, false, p.D, sums);
#pragma unroll 1
    for (int of_values = 0; of_values < 2; ++of_values) {
      T* out = static_cast<T*>(of_values ? p.grad_values : p.grad_keys);
      if (!out) continue;
      const bool whole = of_values ? x.whole_d_values : x.whole_d_keys;
      block.spread(out, l0, of_values ? p.E : p.D, whole, [&](int channel, A(&rows)[kFewSums]) {
        if (!of_values) block.add_spread(block.queries, plan.pitch, dz, channel, rows);                        // (8)
        if (of_values || p.shared) block.add_spread(block.scaled, plan.scaled_pitch, weights, channel, rows);  // (9)
      });
    }
    if (!plan.same) {
      __syncthreads();
      block.start(block.piece);
    }
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.G;
  const A total = centers_total(block, bias);
  if (p.grad_bias && threadIdx.x < p.G) (plan.splits > 1 ? x.counts : p.grad_bias)[first + threadIdx.x] = total;
  if (!p.grad_queries) return;
#pragma unroll
  for (int i = 0; i < kFewSums; ++i) {
    const int64_t g = block.center_of(i), d = block.channel_of(i);
    if (g >= p.G || d >= p.D) continue;
    if (plan.splits > 1) {
      x.sums[(first + g) * p.D + d] = sums[i];
    } else {
      static_cast<T*>(p.grad_queries)[(first + g) * p.D + d] = from_float<T>(sums[i]);
    }
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_merge_kernel(FewArgs<K> x) {
  using T = typename K::T;
  const auto& p = x.p;
  const int64_t i = blockIdx.x;
  if (p.grad_bias && threadIdx.x == 0) p.grad_bias[i] = merged(x.counts, x.plan.splits, i, p.G, 1, 0);
  for (int64_t d = threadIdx.x; p.grad_queries && d < p.D; d += kThreads) {
    static_cast<T*>(p.grad_queries)[i * p.D + d] = from_float<T>(merged(x.sums, x.plan.splits, i, p.G, p.D, d));
  }
}

template <typename K>
FewArgs<K> few_arguments(const CenterCuda<typename K::A>& x, bool backward) {
  using T = typename K::T;
  const CenterParams<typename K::A>& p = x.p;
  FewArgs<K> args{};
  static_cast<CenterArgs<K>&>(args) = arguments<K>(x, backward);
  args.plan = few_plan(p, backward);
  auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  auto whole = [&](const void* at, const int64_t (&strides)[3], int64_t width) {
    constexpr int64_t kPart = 16 / sizeof(T);
    return aligned(at) && width % kPart == 0 && strides[2] == 1 && strides[1] % kPart == 0 && strides[0] % kPart == 0;
  };
  constexpr int64_t kNear = K::Score::tensor ? 8 : 4;  // of FewBlock::spread
  args.whole_keys = whole(p.keys, p.key_strides, p.D), args.whole_values = whole(p.values, p.value_strides, p.E);
  args.whole_d_keys = p.D % kNear == 0 && aligned(p.grad_keys);
  args.whole_d_values = p.E % kNear == 0 && aligned(p.grad_values);
  return args;
}

template <typename K>
const char* few_forward(const CenterCuda<typename K::A>& x) {
  const FewArgs<K> args = few_arguments<K>(x, false);
  const FewPlan& plan = args.plan;
  const unsigned blocks = static_cast<unsigned>(x.p.B * plan.splits), centers = static_cast<unsigned>(x.p.B * x.p.G);
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_fwd_few_kernel<K>, blocks, kFewThreads, plan.bytes, x.stream, args));
  if (plan.splits == 1) return nullptr;
  return OVSEG_LAUNCH(center_assignment_fwd_merge_kernel<K>, centers, kThreads, 0, x.stream, args);
}

template <typename K>
const char* few_backward(const CenterCuda<typename K::A>& x) {
  const FewArgs<K> args = few_arguments<K>(x, true);
  const FewPlan& plan = args.plan;
  const unsigned blocks = static_cast<unsigned>(x.p.B * plan.splits), centers = static_cast<unsigned>(x.p.B * x.p.G);
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_few_kernel<K>, blocks, kFewThreads, plan.bytes, x.stream, args));
  if (plan.splits == 1 || (!x.p.grad_queries && !x.p.grad_bias)) return nullptr;
  return OVSEG_LAUNCH(center_assignment_bwd_merge_kernel<K>, centers, kThreads, 0, x.stream, args);
}

}  // namespace
}  // namespace ovseg
