// patch_text_similarity on CUDA: arithmetic of each input type, arguments, and the kernels of the forward.
// Equation numbers: ovseg_kernels/ops/patch_text_similarity.py.
#pragma once
#include "../common/block.cuh"
#include "../common/tile.cuh"
#include "patch_text_similarity_cuda.h"

namespace ovseg {
namespace {

// How the products of one input type are computed: cosines, Gram form of the forward, everything in the backward.
// Weights lie in 0 .. 1 and the Gram matrix in -1 .. 1, where float16 has three bits more than bfloat16. Coefficients
// can be of any size: bfloat16 keeps its range, and float16 inputs, which are exact in tf32, go through that. Careful:
// with all digits of the operands.
template <typename T_, typename Cosine_, typename Gram_, typename Back_>
struct Kind {
  using T = T_;
  using Cosine = Cosine_;
  using Gram = Gram_;
  using Back = Back_;
  using Careful = std::conditional_t<std::is_same_v<Cosine, Tf32>, Tf32Twice, Cosine>;
  using A = typename Cosine::Sum;
  using G = typename Gram::Element;
  using W = typename Back::Element;
};
using Float64 = Kind<double, Exact<double>, Exact<double>, Exact<double>>;
using Float32 = Kind<float, Exact<float>, Exact<float>, Exact<float>>;
using Float32Fast = Kind<float, Tf32, Tf32, Tf32>;
using Float16 = Kind<half, Mma16<half>, Mma16<half>, Tf32>;
using BFloat16 = Kind<bfloat16, Mma16<bfloat16>, Mma16<half>, Mma16<bfloat16>>;

template <typename A>
constexpr int kWindow = patch_text_window(sizeof(A) == 8);
template <typename A>
constexpr int kScorePitch = kWindow<A> + 16 / sizeof(A);
template <typename A>
constexpr int kSumBytes = kTile * kTilePitch * sizeof(A);
template <typename A>
constexpr int kStages = kStageBytes > kSumBytes<A> ? kStageBytes : kSumBytes<A>;  // products, and tiles being summed
// Below this share of sum (a |u|)^2, what rounding leaves of |v|^2 is no longer enough: the row has cancelled.
template <typename P>
constexpr float kCancelled = P::tensor ? 0.25f : 0.02f;
template <typename A>
constexpr A kEps = A(1e-12);  // of norms, as in torch.nn.functional.normalize

template <typename K>
struct Args {
  using A = typename K::A;
  int64_t T, N, D, first, pitch, pitch_d;  // first image of the chunk
  Pool pool;
  Weight weight;
  bool gram;
  const typename K::T *patches, *texts;
  int64_t patch_b, patch_n, patch_d, text_t, text_d, mask_b, mask_n;
  const bool* mask;
  const A *scale, *bias;
  A *similarity, *lse, *norm;
  const A* grad;
  typename K::T *grad_patches, *grad_texts;
  A *norms, *longest, *text_norms;  // [chunk, N], [chunk], [T]
  typename K::G* gram_matrix;       // [chunk, N, pitch], forward
  typename K::W *gram_back, *weights, *vectors, *coefficients, *hessian;
  A *along, *factors, *slot_texts;
  int32_t* best;
  uint32_t* cancelled;        // [chunk, tiles of T, 2]: a bit for each text whose |v|^2 has cancelled
  int32_t* cancelled_blocks;  // blocks of the chunk that have found one
  double* scalars;
  int64_t slots;

  __device__ bool kept(int64_t image, int64_t n) const { return !mask || mask[image * mask_b + n * mask_n]; }
  __device__ A inverse_norm(int64_t i, int64_t n) const { return A(1) / larger(norms[i * N + n], kEps<A>); }
  __device__ A inverse_text(int64_t t) const { return A(1) / larger(text_norms[t], kEps<A>); }
  __device__ Operand<typename K::T, A> patch_rows(int64_t i) const {  // row n, depth D
    const int64_t b = first + i;
    return {patches + b * patch_b, patch_n, patch_d, N, D, mask ? mask + b * mask_b : nullptr, mask_n, false};
  }
  __device__ Operand<typename K::T, A> patch_columns(int64_t i) const {  // row d, depth N
    return patch_columns(i, 0, N);
  }
  __device__ Operand<typename K::T, A> patch_columns(int64_t i, int64_t n, int64_t count) const {  // patches n and on
    const int64_t b = first + i;
    const bool* keep = mask ? mask + b * mask_b + n * mask_n : nullptr;
    return {patches + b * patch_b + n * patch_n, patch_d, patch_n, D, count, keep, mask_n, true};
  }
  __device__ Operand<typename K::T, A> text_rows() const { return {texts, text_t, text_d, T, D}; }

  // log f(s), equation (2), and d log f / d(scale s).
  __device__ A logit(A s) const {
    const A x = *scale * s;
    if (weight == Weight::softmax) return x;
    return -softplus(-(x + *bias));
  }
  __device__ A slope(A s) const { return weight == Weight::softmax ? A(1) : A(1) / (A(1) + exp(*scale * s + *bias)); }
};

// Norms of the patches of one image, or of 4 texts; and the longest patch.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_patch_norms_kernel(Args<K> p) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t i = blockIdx.x, b = p.first + i;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A top = 0;
  for (int64_t n = warp; n < p.N; n += kThreads / 32) {
    const A norm = p.kept(b, n) ? warp_norm<A>(p.patches + b * p.patch_b + n * p.patch_n, p.patch_d, p.D) : A(0);
    if (lane == 0) p.norms[i * p.N + n] = norm;
    top = larger(top, norm);
  }
  top = block_max<kThreads>(top, reinterpret_cast<A*>(memory));
  if (threadIdx.x == 0) p.longest[i] = top;
  if (threadIdx.x == 0 && i == 0 && p.cancelled_blocks)
    *p.cancelled_blocks = 0;  // no block marks before the next launch
}

template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_text_norms_kernel(Args<K> p) {
  using A = typename K::A;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (t >= p.T) return;
  const A norm = warp_norm<A>(p.texts + t * p.text_t, p.text_d, p.D);
  if (threadIdx.x % 32 == 0) p.text_norms[t] = norm;
}

// G_nm = <u_n, u_m> / (|u_n| longest): times the weights a_m of row m and |u_n| longest this is <u_n, v>.
template <typename K, typename Out>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_gram_kernel(Args<K> p, Out* out) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t i = blockIdx.z, n0 = blockIdx.x * kTile, m0 = blockIdx.y * kTile;
  const auto u = p.patch_rows(i);
  A acc[kAccumulators];
  clear<typename K::Cosine>(acc);
  product<typename K::Cosine>(u, n0, u, m0, memory, acc);
  const A longest = larger(p.longest[i], kEps<A>);
  bool some = false;
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t n = n0 + tile_row<typename K::Cosine>(k), m = m0 + tile_column<typename K::Cosine>(k);
    if (n >= p.N || m >= p.N) continue;
    const A entry = acc[k] * p.inverse_norm(i, n) / longest;
    some |= entry - entry != A(0);
    out[(i * p.N + n) * p.pitch + m] = from_float<Out>(entry);
  }
  if (!some || longest - longest != A(0)) return;
  // Products of long patches that have left the range of A: again, of what their lengths have made small first.
#pragma unroll 1
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t n = n0 + tile_row<typename K::Cosine>(k), m = m0 + tile_column<typename K::Cosine>(k);
    if (n >= p.N || m >= p.N) continue;
    Out* entry = out + (i * p.N + n) * p.pitch + m;
    if (to_float(*entry) - to_float(*entry) == A(0)) continue;
    const typename K::T* row = p.patches + (p.first + i) * p.patch_b;
    A sum = 0;
    for (int64_t d = 0; d < p.D; ++d, row += p.patch_d) {
      sum += to_float(row[n * p.patch_n]) * p.inverse_norm(i, n) * (to_float(row[m * p.patch_n]) / longest);
    }
    *entry = from_float<Out>(sum);
  }
}

// A bit for each text of this block, for cancelled_kernel: two whole warps call.
template <typename K>
__device__ void mark_cancelled(const Args<K>& p, bool cancelled) {
  const unsigned bits = __ballot_sync(kFullWarp, cancelled);
  const int64_t tile = blockIdx.z * static_cast<int64_t>(gridDim.x) + blockIdx.x;
  if (threadIdx.x % 32 == 0) p.cancelled[2 * tile + threadIdx.x / 32] = bits;
  if (threadIdx.x % 32 == 0 && bits) atomicAdd(p.cancelled_blocks, 1);
}

// Forward of 64 texts with one image: cosines window by window, running maximum and sums, then |v| in Gram form.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_fwd_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Cosine;
  OVSEG_DYNAMIC_SHARED(memory);
  A* scores = reinterpret_cast<A*>(memory + kStages<A>);  // [64][kScorePitch]
  A* rows = scores + kTile * kScorePitch<A>;
  A *top = rows, *total = rows + kTile, *along = rows + 2 * kTile, *spread = rows + 3 * kTile, *quad = rows + 4 * kTile;
  A* sums = reinterpret_cast<A*>(memory);  // [64][65], between products
  int32_t* best = reinterpret_cast<int32_t*>(rows + 5 * kTile);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, i = blockIdx.z, b = p.first + i;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool pooled = p.pool == Pool::vector, in_gram = pooled && p.gram;
  const A longest = larger(p.longest[i], kEps<A>);
  if (threadIdx.x < kTile) {
    top[threadIdx.x] = minus_infinity<A>();
    total[threadIdx.x] = along[threadIdx.x] = spread[threadIdx.x] = quad[threadIdx.x] = 0;
    best[threadIdx.x] = -1;
  }
  const auto texts = p.text_rows();
  const auto patches = p.patch_rows(i);
  A acc[kAccumulators];
  for (int64_t w0 = 0; w0 < p.N; w0 += kWindow<A>) {
    const int64_t width = p.N - w0 < kWindow<A> ? p.N - w0 : kWindow<A>;
    for (int64_t n0 = w0; n0 < w0 + width; n0 += kTile) {
      clear<P>(acc);
      product<P>(texts, t0, patches, n0, memory, acc);
#pragma unroll
      for (int k = 0; k < kAccumulators; ++k) {
        const int64_t n = n0 + tile_column<P>(k);
        if (n < p.N) scores[tile_row<P>(k) * kScorePitch<A> + n - w0] = acc[k];
      }
    }
    __syncthreads();
    for (int row = warp; row < kTile && t0 + row < p.T; row += kThreads / 32) {
      A* s = scores + row * kScorePitch<A>;
      const A q_inverse = p.inverse_text(t0 + row);
      A window_top = minus_infinity<A>();
      for (int64_t n = lane; n < width; n += 32) {
        s[n] = s[n] * p.inverse_norm(i, w0 + n) * q_inverse;  // (1), with the bits that the backward finds
        if (!p.kept(b, w0 + n)) continue;
        window_top = larger(p.pool == Pool::max ? s[n] : p.logit(s[n]), window_top);
      }
      window_top = warp_max(window_top);
      const A before = top[row];
      const A now = larger(window_top, before);
      if (p.pool == Pool::max) {  // and the first patch that reaches it
        int found = 0x7fffffff;
        for (int64_t n = lane; n < width; n += 32) {
          if (p.kept(b, w0 + n) && (s[n] == now || s[n] != s[n]) && w0 + n < found) found = static_cast<int>(w0 + n);
        }
        for (int other = 16; other > 0; other /= 2) {
          const int theirs = __shfl_xor_sync(kFullWarp, found, other);
          found = theirs < found ? theirs : found;
        }
        if (lane == 0 && found != 0x7fffffff && (before != now || best[row] < 0)) best[row] = found;
        if (lane == 0) top[row] = now;
        __syncwarp();
        continue;
      }
      A sum = 0, with_s = 0, squares = 0;
      A exponentials[kWindow<A> / 32];  // in place: cosines become the operand of the Gram form
#pragma unroll
      for (int k = 0; k < kWindow<A> / 32; ++k) {
        const int n = lane + 32 * k;
        A e = 0;
        if (n < width && p.kept(b, w0 + n)) {
          e = exp(p.logit(s[n]) - now);
          const A length = pooled ? p.norms[i * p.N + w0 + n] / longest : A(1);
          sum += e;
          with_s += e * length * s[n];
          squares += e * length * e * length;
        }
        exponentials[k] = e;
      }
      sum = warp_sum(sum), with_s = warp_sum(with_s), squares = warp_sum(squares);
      if (in_gram) {
        __syncwarp();
        auto* w = reinterpret_cast<typename K::G*>(s);
        // G holds longest once and |u_m| in its columns: the operand is the weight itself.
#pragma unroll
        for (int k = 0; k < kWindow<A> / 32; ++k) w[lane + 32 * k] = from_float<typename K::G>(exponentials[k]);
      }
      if (lane == 0) {
        const A factor = before == now ? A(1) : exp(before - now);
        total[row] = total[row] * factor + sum;
        along[row] = along[row] * factor + with_s;
        spread[row] = spread[row] * factor * factor + squares;
        top[row] = now;
      }
      __syncwarp();
    }
    __syncthreads();
  }
  if (in_gram) {  // |v|^2 = sum_n a_n |u_n| longest (G a)_n, in units of longest^2 and of the unnormalised weights
    using Q = typename K::Gram;
    constexpr int pitch = kScorePitch<A> * sizeof(A) / sizeof(typename K::G);
    const auto* w = reinterpret_cast<const typename K::G*>(scores);
    const Operand<typename K::G, A> gram = {p.gram_matrix + i * p.N * p.pitch, p.pitch, 1, p.N, p.N};
    for (int64_t n0 = 0; n0 < p.N; n0 += kTile) {
      clear<Q>(acc);
      product_resident<Q>(w, pitch, gram, n0, memory, acc);
#pragma unroll
      for (int k = 0; k < kAccumulators; ++k) {
        const int row = tile_row<Q>(k), column = tile_column<Q>(k);
        const int64_t n = n0 + column;
        const A length = n < p.N ? p.norms[i * p.N + n] / longest : A(0);
        sums[row * kTilePitch + column] =
            n < p.N && t0 + row < p.T ? to_float(w[row * pitch + n]) * length * acc[k] : A(0);
      }
      __syncthreads();
      if (threadIdx.x < kTile) {
        for (int column = 0; column < kTile; ++column) quad[threadIdx.x] += sums[threadIdx.x * kTilePitch + column];
      }
      __syncthreads();
    }
  }
  for (int row = warp; row < kTile && t0 + row < p.T; row += kThreads / 32) {
    const int64_t out = b * p.T + t0 + row;
    const bool some = p.pool == Pool::max ? best[row] >= 0 : !(total[row] == A(0));
    if (p.pool == Pool::max) {
      if (lane == 0 && p.best) p.best[i * p.T + t0 + row] = best[row];  // backward: only which patch it was
      if (lane == 0 && !p.best) p.similarity[out] = some ? top[row] : A(0);
      continue;
    }
    const A lse = some ? top[row] + log(total[row]) : minus_infinity<A>();
    if (lane == 0) p.lse[out] = lse;
    if (pooled && !in_gram) {  // pooled_norms_kernel follows, and finds sum (a |u| / longest)^2 in place of the norm
      if (lane == 0) p.norm[out] = some ? spread[row] / (total[row] * total[row]) : A(0);
      continue;
    }
    A phi = some ? along[row] / total[row] : A(0), norm = 0;  // (3)
    if (in_gram && some) {
      // The error of |v|^2 in Gram form is the rounding of one product times sum (a |u|)^2.
      if (lane == 0) best[row] = quad[row] < A(kCancelled<typename K::Gram>) * spread[row] ? 1 : 0;
      norm = sqrt(quad[row]) * longest / total[row];
      phi = along[row] * longest / total[row] / larger(norm, kEps<A>);  // (4)
      // |v| of the weights that the backward makes of the rounded lse: a large scale would multiply the difference.
      norm *= total[row] / exp(lse - top[row]);
    }
    if (lane == 0) {
      p.similarity[out] = phi;
      if (in_gram) p.norm[out] = norm;
    }
  }
  if (!in_gram) return;
  __syncthreads();
  if (threadIdx.x < kTile) mark_cancelled(p, best[threadIdx.x] == 1);
}

// Weights a [64 texts, 64 patches] with their log-sum known.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_weights_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Cosine;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, n0 = blockIdx.y * kTile, i = blockIdx.z, b = p.first + i;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(p.text_rows(), t0, p.patch_rows(i), n0, memory, acc);
  A* tile = reinterpret_cast<A*>(memory);
  store_tile<P>(acc, tile);
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int64_t t = t0 + e / kTile, n = n0 + e % kTile;
    if (t >= p.T || n >= p.N) continue;
    const A s = tile[e / kTile * kTilePitch + e % kTile] * p.inverse_norm(i, n) * p.inverse_text(t);
    const A a = p.kept(b, n) ? exp(p.logit(s) - p.lse[b * p.T + t]) : A(0);  // (2)
    p.weights[(i * p.T + t) * p.pitch + n] = from_float<typename K::W>(a);
  }
}

template <typename K>
__device__ Operand<typename K::W, typename K::A> weight_rows(const Args<K>& p, int64_t i) {  // row t, depth N
  return {p.weights + i * p.T * p.pitch, p.pitch, 1, p.T, p.N};
}

// Forward, pooled-vector form: v = a U tile by tile, only |v| and v . q leave the block.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_pooled_norms_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  A* sums = reinterpret_cast<A*>(memory);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, i = blockIdx.z, b = p.first + i;
  const int64_t t = t0 + threadIdx.x;
  const A longest = larger(p.longest[i], kEps<A>), inverse = A(1) / longest;  // in this unit no square overflows
  bool cancelled = false;
  A acc[kAccumulators], squared = 0, dot = 0;
  for (int64_t d0 = 0; d0 < p.D; d0 += kTile) {
    clear<P>(acc);
    product<P>(weight_rows(p, i), t0, p.patch_columns(i), d0, memory, acc);
    store_tile<P>(acc, sums);
    __syncthreads();
    if (threadIdx.x < kTile && t < p.T) {
      for (int64_t d = d0; d < p.D && d < d0 + kTile; ++d) {
        const A v = sums[threadIdx.x * kTilePitch + d - d0] * inverse;
        squared += v * v;
        dot += v * to_float(p.texts[t * p.text_t + d * p.text_d]);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < kTile && t < p.T) {
    const A norm = sqrt(squared) * longest, spread = p.norm[b * p.T + t];
    cancelled = squared < A(kCancelled<P>) * spread;
    p.norm[b * p.T + t] = norm;
    p.similarity[b * p.T + t] = dot * p.inverse_text(t) * (longest / larger(norm, kEps<A>));  // (4)
  }
  // The weights of a tensor-core product were rounded; those of an exact one have all their digits.
  if (P::tensor && threadIdx.x < kTile) mark_cancelled(p, cancelled);
}

template <typename A>
constexpr int kForwardShared =
    kStages<A> + (kTile * kScorePitch<A> + 5 * kTile) * static_cast<int>(sizeof(A)) + kTile * 4;
static_assert(kForwardShared<float> <= 99 * 1024 && kForwardShared<double> <= 99 * 1024,
              "what a block of sm_86 to sm_120 has");

}  // namespace
}  // namespace ovseg
