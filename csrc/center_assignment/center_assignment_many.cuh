// center_assignment with any number of centers: scores by tiles of 64 tokens and 64 centers, pooling by threads that
// own channels, and a kernel for each gradient. Grids lie along x alone: y and z end at 65535.
#pragma once
#include "center_assignment_args.cuh"

namespace ovseg {
namespace {

// A block of a grid of images and `tiles` tiles of 64 each.
struct TokenTile {
  int64_t b, l0;
  __device__ explicit TokenTile(int64_t L, int64_t block = blockIdx.x) {
    const int64_t tiles = ceil_div(L, kTile);
    b = block / tiles, l0 = block % tiles * kTile;
  }
};

// Where the scores of this block's tokens lie: in its shared memory, or in the workspace where that cannot hold them.
template <typename K>
__device__ typename K::A* scores_of(const CenterArgs<K>& x, unsigned char* memory, int arrays) {
  using A = typename K::A;
  if (x.wide) return x.wide + static_cast<int64_t>(blockIdx.x) * arrays * kTile * center_pitch(x.p.G);
  return reinterpret_cast<A*>(memory + kStageBytes);
}

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
  A* scores = scores_of(x, memory, 1);
  const CenterParams<A>& p = x.p;
  const TokenTile tile(p.L);
  const int64_t l0 = tile.l0, b = tile.b, l = l0 + threadIdx.x;
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
  const int64_t flag = 2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) x.spoiled[flag] = bad != 0;
}

constexpr int kPoolTokens = 8;  // loads of a thread that are under way together

// How a thread pools `width` neighbouring channels: their sums of all centers lie in shared memory.
template <typename K, int width>
struct Pooling {
  using A = typename K::A;
  static constexpr int kWidth = width;
  static constexpr int kPart = width * sizeof(A) > 16 ? 16 / sizeof(A) : width;  // channels that move together
  static constexpr int kParts = width / kPart;
  using Values = Pack<typename K::T, width>;
  using Part = Pack<A, kPart>;

  static size_t shared_bytes(int64_t G) { return pool_bytes<A>(G, width); }
  // One block at least: the counts are its work too.
  __host__ __device__ static int64_t blocks(int64_t E) { return E > 0 ? ceil_div(E, kPoolThreads * width) : 1; }
  static bool fits(int64_t G) { return shared_bytes(G) <= kBlockBytes; }
};

// pooled and counts: a block of one warp owns neighbouring channels of an image and walks its tokens in order.
template <typename P, typename K>
__global__ void __launch_bounds__(kPoolThreads) center_assignment_fwd_pool_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int thread = threadIdx.x, G = static_cast<int>(p.G);
  int32_t* staged = reinterpret_cast<int32_t*>(memory);                         // [kPoolStage]
  auto* sums = reinterpret_cast<typename P::Part*>(memory + kPoolStage * 4);    // [G, kParts, kPoolThreads]
  A* counts = x.tallies ? x.tallies + static_cast<int64_t>(blockIdx.x) * 2 * G  // [G]
                        : reinterpret_cast<A*>(sums + G * P::kParts * kPoolThreads);
  int32_t* tokens = reinterpret_cast<int32_t*>(counts + G);  // [G], of the hard assignment
  const int64_t blocks = P::blocks(p.E), b = blockIdx.x / blocks;
  const int64_t e = (blockIdx.x % blocks * kPoolThreads + thread) * P::kWidth;
  const bool mine = e < p.E;
  const typename K::T* column = x.value(b) + e * p.value_strides[2];
  // Too many centers for shared memory: their sums grow where they will be read.
  auto part_of = [&](int g, int part) -> typename P::Part& {
    if (!x.tallies) return sums[(g * P::kParts + part) * kPoolThreads + thread];
    return *reinterpret_cast<typename P::Part*>(p.pooled + (b * p.G + g) * p.E + e + part * P::kPart);
  };
  for (int g = 0; mine && g < G; ++g) {
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
    const int end = static_cast<int>(p.L - l0 < kPoolStage ? p.L - l0 : kPoolStage);
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
    if (blockIdx.x % blocks == 0) p.count[b * p.G + g] = count;
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
  const A rho = x.scale_upstream(i, x.scaled + i * p.E);
  if (threadIdx.x % 32 == 0) x.rho[i] = rho;
}

// From scores and <p_g, v_l> to d scores, equations (6) and (7), of 64 tokens; the soft weights for (9) beside them.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_scores_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const CenterParams<A>& p = x.p;
  const int pitch = center_pitch(p.G);
  A *scores = scores_of(x, memory, 2), *ds = scores + kTile * pitch;
  const TokenTile tile(p.L);
  const int64_t l0 = tile.l0, b = tile.b, l = l0 + threadIdx.x;
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
  const int64_t channels = ceil_div(p.D, kTile), d0 = blockIdx.x % channels * kTile;
  const TokenTile tile(p.L, blockIdx.x / channels);
  const int64_t l0 = tile.l0, b = tile.b;
  const Operand<A, A> dz = {x.d_scores + b * p.L * p.G, p.G, 1, p.L, p.G};
  const Operand<typename K::T, A> q = {x.query(b), p.query_strides[2], p.query_strides[1], p.D, p.G};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(dz, l0, q, d0, memory, acc);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t l = l0 + tile_row<P>(i), d = d0 + tile_column<P>(i);
    if (l < p.L && d < p.D) {
      const A sum = x.factor(b, l) * acc[i] + (p.shared ? value_gradient(x, b, l, d) : A(0));
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
  const int64_t channels = ceil_div(p.D, kTile), d0 = blockIdx.x % channels * kTile;
  const TokenTile tile(p.G, blockIdx.x / channels);  // of centers
  const int64_t g0 = tile.l0, b = tile.b;
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

// d v of 64 tokens: one thread a channel.
template <typename K>
__global__ void __launch_bounds__(kThreads) center_assignment_bwd_values_kernel(CenterArgs<K> x) {
  using A = typename K::A;
  const CenterParams<A>& p = x.p;
  const TokenTile tile(p.L);
  for (int64_t l = tile.l0; l < tile.l0 + kTile && l < p.L; ++l) {
    for (int64_t e = threadIdx.x; e < p.E; e += kThreads) {
      static_cast<typename K::T*>(p.grad_values)[(tile.b * p.L + l) * p.E + e] =
          from_float<typename K::T>(value_gradient(x, tile.b, l, e));
    }
  }
}

// Whether the channels of a thread are one load of 16 bytes, whatever the token.
template <typename P, typename A>
bool in_vectors(const CenterParams<A>& p) {
  auto whole = [](int64_t elements) { return elements % P::kWidth == 0; };
  auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.value_strides[2] == 1 && whole(p.E) && whole(p.value_strides[1]) && whole(p.value_strides[0]) &&
         aligned(p.values) && aligned(p.pooled) && P::fits(p.G);
}

template <typename P, typename K>
const char* pool(const CenterArgs<K>& args, void* stream) {
  const CenterParams<typename K::A>& p = args.p;
  return OVSEG_LAUNCH((center_assignment_fwd_pool_kernel<P, K>), static_cast<unsigned>(p.B * P::blocks(p.E)),
                      kPoolThreads, P::shared_bytes(args.tallies ? 0 : p.G), stream, args);
}

template <typename K>
const char* many_forward(const CenterCuda<typename K::A>& x) {
  const CenterParams<typename K::A>& p = x.p;
  const CenterArgs<K> args = arguments<K>(x, false);
  const size_t bytes = kStageBytes + (args.wide ? 0 : score_bytes<typename K::A>(p.G));
  if (p.L > 0) {
    const unsigned tiles = static_cast<unsigned>(p.B * ceil_div(p.L, kTile));
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_fwd_scores_kernel<K>, tiles, kThreads, bytes, x.stream, args));
  }
  using Wide = Pooling<K, 16 / sizeof(typename K::T)>;
  return in_vectors<Wide>(p) ? pool<Wide>(args, x.stream) : pool<Pooling<K, 1>>(args, x.stream);
}

template <typename K>
const char* many_backward(const CenterCuda<typename K::A>& x) {
  const CenterParams<typename K::A>& p = x.p;
  const CenterArgs<K> args = arguments<K>(x, true);
  const size_t bytes = kStageBytes + (args.wide ? 0 : 2 * score_bytes<typename K::A>(p.G));
  const unsigned tiles = static_cast<unsigned>(p.B * ceil_div(p.L, kTile));
  const unsigned center_tiles = static_cast<unsigned>(p.B * ceil_div(p.G, kTile));
  const unsigned centers = static_cast<unsigned>(ceil_div(p.B * p.G, kThreads / 32));
  const unsigned channels = static_cast<unsigned>(ceil_div(p.D, kTile));
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_prepare_kernel<K>, centers, kThreads, 0, x.stream, args));
  OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_scores_kernel<K>, tiles, kThreads, bytes, x.stream, args));
  if (p.grad_keys) {
    OVSEG_TRY(
        OVSEG_LAUNCH(center_assignment_bwd_keys_kernel<K>, tiles * channels, kThreads, kStageBytes, x.stream, args));
  }
  if (p.grad_queries) {
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_queries_kernel<K>, center_tiles * channels, kThreads, kStageBytes,
                           x.stream, args));
  }
  if (p.grad_bias) {
    OVSEG_TRY(OVSEG_LAUNCH(center_assignment_bwd_bias_kernel<K>, centers, kThreads, 0, x.stream, args));
  }
  if (!p.grad_values || p.E == 0) return nullptr;
  return OVSEG_LAUNCH(center_assignment_bwd_values_kernel<K>, tiles, kThreads, 0, x.stream, args);
}

}  // namespace
}  // namespace ovseg
