// The kernels of center_assignment and their launches, one translation unit per kind of arithmetic: OVSEG_KIND at the
// end.
#pragma once
#include "../common/philox.h"
#include "../common/tile.cuh"
#include "center_assignment_cuda.h"

namespace ovseg {
namespace {

// Products of scores (Score) and those with d scores, which can be of any size (Back): see
// patch_text_similarity_fwd.cuh.
template <typename T_, typename Score_, typename Back_>
struct CenterKind {
  using T = T_;
  using Score = Score_;
  using Back = Back_;
  using A = typename Score_::Sum;
};
using Float64 = CenterKind<double, Exact<double>, Exact<double>>;
using Float32 = CenterKind<float, Exact<float>, Exact<float>>;
using Float16 = CenterKind<half, Mma16<half>, Tf32>;
using BFloat16 = CenterKind<bfloat16, Mma16<bfloat16>, Tf32>;

template <typename K>
struct CenterArgs : CenterBuffers<typename K::A> {
  using A = typename K::A;
  using T = typename K::T;
  CenterParams<A> p;

  __device__ bool kept(int64_t b, int64_t l) const {
    return !p.mask || p.mask[b * p.mask_strides[0] + l * p.mask_strides[1]];
  }
  __device__ const bool* keep_of(int64_t b) const { return p.mask ? p.mask + b * p.mask_strides[0] : nullptr; }
  __device__ const T* key(int64_t b) const { return static_cast<const T*>(p.keys) + b * p.key_strides[0]; }
  __device__ const T* value(int64_t b) const { return static_cast<const T*>(p.values) + b * p.value_strides[0]; }
  __device__ const T* query(int64_t b) const { return static_cast<const T*>(p.queries) + b * p.query_strides[0]; }
  __device__ Operand<T, A> key_rows(int64_t b) const {  // row l, depth D
    return {key(b), p.key_strides[1], p.key_strides[2], p.L, p.D, keep_of(b), p.mask_strides[1], false};
  }
  __device__ Operand<T, A> key_columns(int64_t b) const {  // row d, depth L
    return {key(b),
            p.key_strides[2],
            p.key_strides[1],
            p.D,
            p.L,
            keep_of(b),
            p.mask_strides[1],
            true,
            p.key_scale ? p.key_scale + b * p.L : nullptr};
  }
  __device__ Operand<T, A> value_rows(int64_t b) const {  // row l, depth E
    return {value(b), p.value_strides[1], p.value_strides[2], p.L, p.E, keep_of(b), p.mask_strides[1], false};
  }
  __device__ Operand<T, A> query_rows(int64_t b) const {  // row g, depth D
    return {query(b), p.query_strides[1], p.query_strides[2], p.G, p.D};
  }
  __device__ A noise(int64_t b, int64_t g, int64_t l) const {
    if (p.noise) return p.noise[b * p.noise_strides[0] + g * p.noise_strides[1] + l * p.noise_strides[2]];
    if (p.rng) return static_cast<A>(gumbel_from_bits(philox_bits(p.rng[0], p.rng[1], (b * p.L + l) * p.G + g)));
    return A(0);
  }
  __device__ A score(int64_t b, int64_t g, int64_t l, A raw) const {  // (1)
    const A factor = p.key_scale ? p.scale * p.key_scale[b * p.L + l] : p.scale;
    return factor * raw + (p.center_bias ? p.center_bias[b * p.G + g] : A(0));
  }
  __device__ A divisor(A count) const {  // (4)
    if (p.normalizer == Normalizer::sum) return A(1);
    if (p.normalizer == Normalizer::mean_plus_one) return count + A(1);
    return count < A(1) ? A(1) : count;
  }
};

__host__ __device__ inline int center_pitch(int64_t G) { return static_cast<int>(G) + 1; }

// A [64, G] B [64, E or D]^T of 64 tokens and all centers into shared memory, rows center_pitch(G) apart.
template <typename P, typename TA, typename TB>
__device__ void all_centers(const Operand<TA, typename P::Sum>& tokens, int64_t l0,
                            const Operand<TB, typename P::Sum>& centers, unsigned char* stages, typename P::Sum* out) {
  typename P::Sum acc[kAccumulators];
  for (int64_t g0 = 0; g0 < centers.rows; g0 += kTile) {
    clear<P>(acc);
    product<P>(tokens, l0, centers, g0, stages, acc);
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) {
      const int64_t g = g0 + tile_column<P>(i);
      if (g < centers.rows) out[tile_row<P>(i) * center_pitch(centers.rows) + g] = acc[i];
    }
  }
  __syncthreads();
}

// Softmax of y over the centers in place; returns the first center that is largest.
template <typename A>
__device__ int softmax(A* y, int64_t G) {
  int best = 0;
  for (int g = 1; g < G; ++g) {
    if (y[g] > y[best] || (y[g] != y[g] && y[best] == y[best])) best = g;
  }
  const A top = y[best];
  A sum = 0;
  for (int g = 0; g < G; ++g) {
    y[g] = exp(y[g] - top);
    sum += y[g];
  }
  for (int g = 0; g < G; ++g) y[g] /= sum;
  return best;
}

// Winner of a token from its products q . k in `z` and, where they are wanted, the softmax without noise (5) and the
// soft weights (2), which `z` ends as.
template <typename K>
__device__ void find_center(const CenterArgs<K>& x, int64_t b, int64_t l, bool keep, typename K::A* z) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  if (p.soft) {
    // The same row serves twice: the scores wait in the output.
    for (int g = 0; g < p.G; ++g) p.soft[(b * p.G + g) * p.L + l] = z[g];
    for (int g = 0; g < p.G; ++g) z[g] = x.score(b, g, l, z[g]);
    softmax(z, p.G);
    for (int g = 0; g < p.G; ++g) {
      A* out = p.soft + (b * p.G + g) * p.L + l;
      const A raw = *out;
      *out = keep ? z[g] : A(0);
      z[g] = raw;
    }
  }
  for (int g = 0; g < p.G; ++g) z[g] = (x.score(b, g, l, z[g]) + x.noise(b, g, l)) / p.tau;
  const int best = softmax(z, p.G);
  p.index[b * p.L + l] = keep ? best : -1;
  if (!p.hard) {
    for (int g = 0; g < p.G; ++g) x.weights[(b * p.L + l) * p.G + g] = keep ? z[g] : A(0);
  }
}

// Scores and winners of 64 tokens.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_fwd_scores_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  A* scores = reinterpret_cast<A*>(memory + kStageBytes);
  const CenterParams<A>& p = x.p;
  const int64_t l0 = static_cast<int64_t>(blockIdx.x) * kTile, b = blockIdx.y, l = l0 + threadIdx.x;
  all_centers<typename K::Score>(x.key_rows(b), l0, x.query_rows(b), memory, scores);
  if (threadIdx.x >= kTile) return;
  A* z = scores + threadIdx.x * center_pitch(p.G);
  const bool keep = l < p.L && x.kept(b, l);
  bool spoiled = false;
  if (l < p.L) {
    find_center(x, b, l, keep, z);
    spoiled = keep && z[0] != z[0];
  }
  const unsigned bad = __ballot_sync(kFullWarp, spoiled);
  const int64_t flag = b * 2 * gridDim.x + 2 * blockIdx.x + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) x.spoiled[flag] = bad != 0;
}

// Neighbouring elements that one instruction moves.
template <typename X, int count>
struct alignas(count * sizeof(X)) Pack {
  X x[count];
};

constexpr unsigned kPoolThreads = 32;
constexpr int kPoolTokens = 8;   // loads of a thread that are under way together
constexpr int kPoolStage = 128;  // tokens whose centers lie in shared memory at a time

// How a thread pools `width` neighbouring channels: their sums of all centers lie in shared memory.
template <typename K, int width>
struct Pooling {
  using A = typename K::A;
  static constexpr int kWidth = width;
  static constexpr int kPart = width * sizeof(A) > 16 ? 16 / sizeof(A) : width;  // channels that move together
  static constexpr int kParts = width / kPart;
  using Values = Pack<typename K::T, width>;
  using Part = Pack<A, kPart>;

  static int64_t shared_bytes(int64_t G) {
    return G * (kPoolThreads * width * static_cast<int64_t>(sizeof(A)) + sizeof(A) + 4) + kPoolStage * 4;
  }
};

// pooled and counts: a block of one warp owns neighbouring channels of an image and walks its tokens in order.
template <typename P, typename K>
__global__ void __launch_bounds__(kPoolThreads) center_assignment_fwd_pool_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int thread = threadIdx.x, G = static_cast<int>(p.G);
  auto* sums = reinterpret_cast<typename P::Part*>(memory);               // [G, kParts, kPoolThreads]
  A* counts = reinterpret_cast<A*>(sums + G * P::kParts * kPoolThreads);  // [G]
  int32_t* tokens = reinterpret_cast<int32_t*>(counts + G);               // [G], of the hard assignment
  int32_t* staged = tokens + G;                                           // [kPoolStage]
  const int64_t b = blockIdx.y, e = (static_cast<int64_t>(blockIdx.x) * kPoolThreads + thread) * P::kWidth;
  const bool mine = e < p.E;
  const typename K::T* column = x.value(b) + e * p.value_strides[2];
  auto part_of = [&](int g, int part) ->
      typename P::Part& { return sums[(g * P::kParts + part) * kPoolThreads + thread]; };
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int part = 0; part < P::kParts; ++part) part_of(g, part) = {};
  }
  for (int g = thread; g < G; g += kPoolThreads) tokens[g] = 0;
  for (int64_t l0 = 0; l0 < p.L; l0 += kPoolStage) {
    __syncthreads();
    for (int i = thread; i < kPoolStage; i += kPoolThreads) {
      const int g = l0 + i < p.L ? static_cast<int>(p.index[b * p.L + l0 + i]) : -1;
      staged[i] = g;
      if (p.hard && g >= 0) atomicAdd(tokens + g, 1);  // whole numbers: their order does not matter
    }
    __syncthreads();
    const int end = p.L - l0 < kPoolStage ? static_cast<int>(p.L - l0) : kPoolStage;
    const typename K::T* token = column + l0 * p.value_strides[1];
    for (int i = 0; mine && i < end; i += kPoolTokens) {
      typename P::Values v[kPoolTokens];
      int centers[kPoolTokens];
#pragma unroll
      for (int k = 0; k < kPoolTokens; ++k) {
        centers[k] = staged[i + k];
        if (centers[k] >= 0) v[k] = *reinterpret_cast<const typename P::Values*>(token);
        token += p.value_strides[1];
      }
      if (p.hard) {
#pragma unroll
        for (int k = 0; k < kPoolTokens; ++k) {
          if (centers[k] < 0) continue;
#pragma unroll
          for (int part = 0; part < P::kParts; ++part) {
            typename P::Part sum = part_of(centers[k], part);
#pragma unroll
            for (int j = 0; j < P::kPart; ++j) sum.x[j] += to_float(v[k].x[part * P::kPart + j]);
            part_of(centers[k], part) = sum;
          }
        }
        continue;
      }
      const A* weights = x.weights + (b * p.L + l0 + i) * p.G;
      for (int g = 0; g < G; ++g) {
        A weight[kPoolTokens];
#pragma unroll
        for (int k = 0; k < kPoolTokens; ++k) weight[k] = centers[k] >= 0 ? weights[k * p.G + g] : A(0);
        typename P::Part sum[P::kParts];
#pragma unroll
        for (int part = 0; part < P::kParts; ++part) sum[part] = part_of(g, part);
#pragma unroll
        for (int k = 0; k < kPoolTokens; ++k) {
          if (centers[k] < 0) continue;
#pragma unroll
          for (int j = 0; j < P::kWidth; ++j) sum[j / P::kPart].x[j % P::kPart] += weight[k] * to_float(v[k].x[j]);
        }
#pragma unroll
        for (int part = 0; part < P::kParts; ++part) part_of(g, part) = sum[part];
      }
    }
  }
  bool spoiled = false;
  for (int64_t i = thread; i < center_flags(p.L); i += kPoolThreads) {
    spoiled |= x.spoiled[b * center_flags(p.L) + i] != 0;
  }
  // Added to what a softmax of NaN has spoiled: straight through, its token has a weight of NaN for all centers.
  const A spoil = __ballot_sync(kFullWarp, spoiled) ? static_cast<A>(NAN) : A(0);
  __syncthreads();
  for (int g = thread; g < G; g += kPoolThreads) {
    A count = static_cast<A>(tokens[g]) + spoil;
    for (int64_t l = 0; !p.hard && l < p.L; ++l) count += x.weights[(b * p.L + l) * p.G + g];
    counts[g] = count;
    if (blockIdx.x == 0) p.count[b * p.G + g] = count;
  }
  __syncthreads();
  A waste = 0;
  for (int g = 0; mine && g < G; ++g) {
    const A divisor = x.divisor(counts[g]);
#pragma unroll
    for (int part = 0; part < P::kParts; ++part) {
      typename P::Part mean = part_of(g, part);
#pragma unroll
      for (int j = 0; j < P::kPart; ++j) {
        mean.x[j] = (mean.x[j] + spoil) / divisor;
        waste += A(0) * mean.x[j];
      }
      *reinterpret_cast<typename P::Part*>(p.pooled + (b * p.G + g) * p.E + e + part * P::kPart) = mean;
    }
  }
  if (!p.hard || waste == A(0)) return;
  // A sum that is not finite leaves no other center a number in its channel: 0 of the definition's one-hot times
  // infinity is none.
  for (int j = 0; j < P::kWidth; ++j) {
    A* out = p.pooled + b * p.G * p.E + e + j;
    int bad = 0;
    for (int g = 0; g < G; ++g) bad += out[g * p.E] - out[g * p.E] != A(0);
    for (int g = 0; g < G; ++g) {
      if (bad > (out[g * p.E] - out[g * p.E] != A(0) ? 1 : 0)) out[g * p.E] = static_cast<A>(NAN);
    }
  }
}

// d pooled / n and rho / n: one warp a center.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_prepare_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= p.B * p.G) return;
  const A count = p.count[i], inverse = A(1) / x.divisor(count);
  A rho = 0;
  for (int64_t e = threadIdx.x % 32; e < p.E; e += 32) {
    const A scaled = p.grad[i * p.E + e] * inverse;
    x.scaled[i * p.E + e] = scaled;
    rho += p.pooled[i * p.E + e] * scaled;
  }
  rho = warp_sum(rho);
  const bool constant = p.normalizer == Normalizer::sum || (p.normalizer == Normalizer::mean && count < A(1));
  if (threadIdx.x % 32 == 0) x.rho[i] = (constant ? A(0) : rho) - (p.grad_count ? p.grad_count[i] : A(0));
}

// From scores and <p_g, v_l> to d scores, equations (6) and (7), of 64 tokens; the soft weights for (9) beside them.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_scores_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int pitch = center_pitch(p.G);
  A *scores = reinterpret_cast<A*>(memory + kStageBytes), *ds = scores + kTile * pitch;
  const int64_t l0 = static_cast<int64_t>(blockIdx.x) * kTile, b = blockIdx.y, l = l0 + threadIdx.x;
  all_centers<typename K::Score>(x.key_rows(b), l0, x.query_rows(b), memory, scores);
  const Operand<A, A> scaled = {x.scaled + b * p.G * p.E, p.E, 1, p.G, p.E};
  all_centers<typename K::Back>(x.value_rows(b), l0, scaled, memory, ds);
  if (threadIdx.x >= kTile || l >= p.L) return;
  A *z = scores + threadIdx.x * pitch, *d = ds + threadIdx.x * pitch;
  A *out = x.d_scores + (b * p.L + l) * p.G, *weight = x.weights + (b * p.L + l) * p.G;
  const bool keep = x.kept(b, l);
  for (int g = 0; g < p.G; ++g) {
    out[g] = z[g];  // raw scores wait in the output
    z[g] = (x.score(b, g, l, z[g]) + x.noise(b, g, l)) / p.tau;
  }
  softmax(z, p.G);
  A mean = 0;
  for (int g = 0; g < p.G; ++g) {
    d[g] -= x.rho[b * p.G + g];  // (6)
    mean += z[g] * d[g];
  }
  for (int g = 0; g < p.G; ++g) {
    weight[g] = keep ? z[g] : A(0);
    d[g] = z[g] * (d[g] - mean) / p.tau;  // (7)
    z[g] = x.score(b, g, l, out[g]);
  }
  if (p.grad_soft) {
    softmax(z, p.G);
    A inner = 0;
    for (int g = 0; g < p.G; ++g) inner += z[g] * p.grad_soft[(b * p.G + g) * p.L + l];
    for (int g = 0; g < p.G; ++g) d[g] += z[g] * (p.grad_soft[(b * p.G + g) * p.L + l] - inner);
  }
  A with_raw = 0;
  for (int g = 0; g < p.G; ++g) {
    with_raw += d[g] * out[g];
    out[g] = keep ? d[g] : A(0);
  }
  if (p.grad_scale) p.grad_scale[b * p.L + l] = keep ? p.scale * with_raw : A(0);  // (10)
}

// d v_l at channel e, (9).
template <typename K>
__device__ inline typename K::A value_gradient(const CenterArgs<K>& x, int64_t b, int64_t l, int64_t e) {
  const auto& p = x.p;
  const int64_t index = p.index[b * p.L + l];
  if (index < 0) return 0;
  if (p.hard) {
    const typename K::A soft = x.weights[(b * p.L + l) * p.G];  // all NaN, or none
    return soft == soft ? x.scaled[(b * p.G + index) * p.E + e] : soft;
  }
  typename K::A value = 0;
  for (int g = 0; g < p.G; ++g) value += x.weights[(b * p.L + l) * p.G + g] * x.scaled[(b * p.G + g) * p.E + e];
  return value;
}

// d k = d scores q, (8), and d v too where the values are the keys.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_keys_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int64_t l0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = blockIdx.y * kTile, b = blockIdx.z;
  const Operand<A, A> dz = {x.d_scores + b * p.L * p.G, p.G, 1, p.L, p.G};
  const Operand<typename K::T, A> q = {x.query(b), p.query_strides[2], p.query_strides[1], p.D, p.G};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(dz, l0, q, d0, memory, acc);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t l = l0 + tile_row<P>(i), d = d0 + tile_column<P>(i);
    if (l < p.L && d < p.D) {
      const A factor = p.key_scale ? p.scale * p.key_scale[b * p.L + l] : p.scale;
      const A sum = factor * acc[i] + (p.shared ? value_gradient(x, b, l, d) : A(0));
      static_cast<typename K::T*>(p.grad_keys)[(b * p.L + l) * p.D + d] = from_float<typename K::T>(sum);
    }
  }
}

// d q = d scores^T k, (8).
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_queries_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int64_t g0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = blockIdx.y * kTile, b = blockIdx.z;
  const Operand<A, A> dz = {x.d_scores + b * p.L * p.G, 1, p.G, p.G, p.L};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(dz, g0, x.key_columns(b), d0, memory, acc);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t g = g0 + tile_row<P>(i), d = d0 + tile_column<P>(i);
    if (g < p.G && d < p.D) {
      static_cast<typename K::T*>(p.grad_queries)[(b * p.G + g) * p.D + d] =
          from_float<typename K::T>(p.scale * acc[i]);
    }
  }
}

// d center_bias, (10): one warp a center.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_bias_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= p.B * p.G) return;
  const int64_t b = i / p.G, g = i % p.G;
  A sum = 0;
  for (int64_t l = threadIdx.x % 32; l < p.L; l += 32) sum += x.d_scores[(b * p.L + l) * p.G + g];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) p.grad_bias[i] = sum;
}

// d v: one thread a channel.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_values_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  const int64_t l = blockIdx.x, b = blockIdx.y;
  for (int64_t e = threadIdx.x; e < p.E; e += kThreads) {
    static_cast<typename K::T*>(p.grad_values)[(b * p.L + l) * p.E + e] =
        from_float<typename K::T>(value_gradient(x, b, l, e));
  }
}

template <typename K>
CenterArgs<K> arguments(const CenterCuda<typename K::A>& x, bool backward) {
  CenterArgs<K> args{};
  static_cast<CenterBuffers<typename K::A>&>(args) = center_buffers(x.p, backward, x.workspace);
  args.p = x.p;
  return args;
}

template <typename A>
size_t score_bytes(const CenterParams<A>& p) {
  return kTile * center_pitch(p.G) * sizeof(A);
}

const char* too_many() {
  return "more than 128 centers (64 in float64), or a grid that CUDA cannot launch; use OVSEG_BACKEND=triton or "
         "reference";
}

template <typename A>
bool fits(const CenterParams<A>& p) {
  return p.G * static_cast<int64_t>(sizeof(A)) <= kMaxCenters * 4 && p.B <= 65535;
}

// Whether the channels of a thread are one load of 16 bytes, whatever the token.
template <typename P, typename A>
bool in_vectors(const CenterParams<A>& p) {
  auto whole = [](int64_t elements) { return elements % P::kWidth == 0; };
  auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.value_strides[2] == 1 && whole(p.E) && whole(p.value_strides[1]) && whole(p.value_strides[0]) &&
         aligned(p.values) && aligned(p.pooled) && P::shared_bytes(p.G) <= 97 * 1024;
}

template <typename P, typename K>
const char* pool(const CenterArgs<K>& args, void* stream) {
  const CenterParams<typename K::A>& p = args.p;
  // One block at least: the counts are its work too.
  const unsigned blocks = static_cast<unsigned>(p.E > 0 ? ceil_div(p.E, kPoolThreads * P::kWidth) : 1);
  return OVSEG_LAUNCH((center_assignment_fwd_pool_kernel<P, K>), dim3(blocks, static_cast<unsigned>(p.B)), kPoolThreads,
                      static_cast<size_t>(P::shared_bytes(p.G)), stream, args);
}

template <typename K>
const char* forward(const CenterCuda<typename K::A>& x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  if (!fits(p)) return too_many();
  const CenterArgs<K> args = arguments<K>(x, false);
  const unsigned B = static_cast<unsigned>(p.B);
  if (p.L > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.L, kTile)), B);
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_fwd_scores_kernel<K>, grid, kThreads, kStageBytes + score_bytes(p),
                           x.stream, args));
  }
  using Wide = Pooling<K, 16 / sizeof(typename K::T)>;
  return in_vectors<Wide>(p) ? pool<Wide>(args, x.stream) : pool<Pooling<K, 1>>(args, x.stream);
}

template <typename K>
const char* backward(const CenterCuda<typename K::A>& x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  if (!fits(p)) return too_many();
  const CenterArgs<K> args = arguments<K>(x, true);
  const unsigned B = static_cast<unsigned>(p.B), tokens = static_cast<unsigned>(ceil_div(p.L, kTile));
  const unsigned centers = static_cast<unsigned>(ceil_div(p.B * p.G, kThreads / 32));
  const unsigned channels = static_cast<unsigned>(ceil_div(p.D, kTile));
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_prepare_kernel<K>, centers, kThreads, 0, x.stream, args));
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_scores_kernel<K>, dim3(tokens, B), kThreads,
                         kStageBytes + 2 * score_bytes(p), x.stream, args));
  if (p.grad_keys) {
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_keys_kernel<K>, dim3(tokens, channels, B), kThreads, kStageBytes,
                           x.stream, args));
  }
  if (p.grad_queries) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.G, kTile)), channels, B);
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_queries_kernel<K>, grid, kThreads, kStageBytes, x.stream, args));
  }
  if (p.grad_bias) {
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_bias_kernel<K>, centers, kThreads, 0, x.stream, args));
  }
  if (!p.grad_values || p.E == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.L), B);
  return OVSEG_LAUNCH(center_assignment_bwd_values_kernel<K>, grid, kThreads, 0, x.stream, args);
}

}  // namespace

}  // namespace ovseg

#define OVSEG_KIND(kind)                                                                         \
  namespace ovseg {                                                                              \
  const char* center_forward_##kind(const CenterCuda<kind::A>& x) { return forward<kind>(x); }   \
  const char* center_backward_##kind(const CenterCuda<kind::A>& x) { return backward<kind>(x); } \
  }
