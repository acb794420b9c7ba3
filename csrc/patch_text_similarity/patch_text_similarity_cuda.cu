// patch_text_similarity on CUDA, sm_80 and newer: texts on the rows of a tile, patches on its columns.
//
// Forward: one block owns 64 texts of one image; their cosines with up to 256 patches stay in shared memory. Raw operands
// go into the product, the float sums are scaled by the norms. |v| comes from the Gram matrix of the image (N within one
// window), or from the pooled vectors, whose weights go through memory, a chunk of images at a time.
// Backward: recompute, turn cosines into coefficients per chunk, then plain products. Every output element has one owner
// and every sum a fixed order: two runs give the same bits. Equation numbers: ovseg_kernels/ops/patch_text_similarity.py.
#include "../common/tile.cuh"
#include "patch_text_similarity_cuda.h"

namespace ovseg {
namespace {

// How the products of one input type are computed: cosines, Gram form of the forward, everything in the backward.
// Weights lie in 0 .. 1 and the Gram matrix in -1 .. 1, where float16 has three bits more than bfloat16. Coefficients can
// be of any size: bfloat16 keeps its range, and float16 inputs, which are exact in tf32, go through that.
template <typename T_, typename Cosine_, typename Gram_, typename Back_>
struct Kind {
  using T = T_;
  using Cosine = Cosine_;
  using Gram = Gram_;
  using Back = Back_;
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
constexpr int kWindow = sizeof(A) == 8 ? 64 : 256;  // patches whose cosines are held at once
template <typename A>
constexpr int kScorePitch = kWindow<A> + 16 / sizeof(A);
template <typename A>
constexpr int kSumBytes = kTile * kTilePitch * sizeof(A);
template <typename A>
constexpr int kStages = kStageBytes > kSumBytes<A> ? kStageBytes : kSumBytes<A>;  // products, and tiles being summed
template <typename A>
constexpr A kEps = A(1e-12);  // of norms, as in torch.nn.functional.normalize

template <typename K>
struct Args {
  using A = typename K::A;
  int64_t B, T, N, D, first, pitch, pitch_d;  // first image of the chunk
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
  A *norms, *longest, *text_norms;   // [chunk, N], [chunk], [T]
  typename K::G* gram_matrix;        // [chunk, N, pitch], forward
  typename K::W *gram_back, *weights, *vectors, *coefficients, *hessian;
  A *along, *factors, *slot_texts;
  int32_t* best;
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
    const int64_t b = first + i;
    return {patches + b * patch_b, patch_d, patch_n, D, N, mask ? mask + b * mask_b : nullptr, mask_n, true};
  }
  __device__ Operand<typename K::T, A> text_rows() const { return {texts, text_t, text_d, T, D}; }

  // log f(s), equation (2), and d log f / d(scale s).
  __device__ A logit(A s) const {
    const A x = *scale * s;
    if (weight == Weight::softmax) return x;
    const A y = x + *bias;
    return (y < A(0) ? y : A(0) * y) - log1p(exp(-fabs(y)));
  }
  __device__ A slope(A s) const {
    return weight == Weight::softmax ? A(1) : A(1) / (A(1) + exp(*scale * s + *bias));
  }
};

// Norms of the patches of one image, or of 4 texts; and the longest patch.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_patch_norms_kernel(Args<K> p) {
  using A = typename K::A;
  OVSEG_DYNAMIC_SHARED(memory);
  A* tops = reinterpret_cast<A*>(memory);
  const int64_t i = blockIdx.x, b = p.first + i;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A top = 0;
  for (int64_t n = warp; n < p.N; n += kThreads / 32) {
    A sum = 0;
    if (p.kept(b, n)) {
      for (int64_t d = lane; d < p.D; d += 32) {
        const A x = to_float(p.patches[b * p.patch_b + n * p.patch_n + d * p.patch_d]);
        sum += x * x;
      }
    }
    const A norm = sqrt(warp_sum(sum));
    if (lane == 0) p.norms[i * p.N + n] = norm;
    top = larger(top, norm);
  }
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) top = larger(top, tops[w]);
    p.longest[i] = top;
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_text_norms_kernel(Args<K> p) {
  using A = typename K::A;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (t >= p.T) return;
  A sum = 0;
  for (int64_t d = threadIdx.x % 32; d < p.D; d += 32) {
    const A x = to_float(p.texts[t * p.text_t + d * p.text_d]);
    sum += x * x;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) p.text_norms[t] = sqrt(sum);
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
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t n = n0 + tile_row<typename K::Cosine>(k), m = m0 + tile_column<typename K::Cosine>(k);
    if (n < p.N && m < p.N) {
      out[(i * p.N + n) * p.pitch + m] = from_float<Out>(acc[k] * p.inverse_norm(i, n) / longest);
    }
  }
}

// |v| and v . q of one row straight from the patches: where the Gram form has cancelled, as for u and -u. One warp.
template <typename K>
__device__ void pooled_directly(const Args<K>& p, int64_t i, int64_t t, typename K::A top, typename K::A* weights,
                                typename K::A& squared, typename K::A& dot) {
  using A = typename K::A;
  const int64_t b = p.first + i;
  const int lane = threadIdx.x % 32;
  for (int64_t n = 0; n < p.N; ++n) {
    const bool keep = p.kept(b, n);
    A sum = 0;
    for (int64_t d = lane; keep && d < p.D; d += 32) {
      sum += to_float(p.patches[b * p.patch_b + n * p.patch_n + d * p.patch_d]) *
             static_cast<A>(to_float(p.texts[t * p.text_t + d * p.text_d]));
    }
    const A s = warp_sum(sum) * p.inverse_norm(i, n) * p.inverse_text(t);
    if (lane == 0) weights[n] = keep ? exp(p.logit(s) - top) : A(0);
  }
  __syncwarp();
  squared = dot = 0;
  for (int64_t d = lane; d < p.D; d += 32) {
    A v = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.kept(b, n)) v += weights[n] * to_float(p.patches[b * p.patch_b + n * p.patch_n + d * p.patch_d]);
    }
    squared += v * v;
    dot += v * to_float(p.texts[t * p.text_t + d * p.text_d]);
  }
  squared = warp_sum(squared);
  dot = warp_sum(dot) * p.inverse_text(t);
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
  const bool in_gram = p.pool == Pool::vector && p.gram;
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
        s[n] *= p.inverse_norm(i, w0 + n) * q_inverse;  // (1)
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
      A kept_s[kWindow<A> / 32];  // in place: cosines become the operand of the Gram form
#pragma unroll
      for (int k = 0; k < kWindow<A> / 32; ++k) {
        const int n = lane + 32 * k;
        A e = 0;
        if (n < width && p.kept(b, w0 + n)) {
          e = exp(p.logit(s[n]) - now);
          const A length = in_gram ? p.norms[i * p.N + w0 + n] / longest : A(1);
          sum += e;
          with_s += e * length * s[n];
          squares += e * length * e * length;
        }
        kept_s[k] = e;
      }
      sum = warp_sum(sum), with_s = warp_sum(with_s), squares = warp_sum(squares);
      if (in_gram) {
        __syncwarp();
        auto* w = reinterpret_cast<typename K::G*>(s);
        // G holds longest once and |u_m| in its columns: the operand is the weight itself.
#pragma unroll
        for (int k = 0; k < kWindow<A> / 32; ++k) w[lane + 32 * k] = from_float<typename K::G>(kept_s[k]);
      }
      if (lane == 0) {
        const A factor = before == now ? A(1) : exp(before - now);
        total[row] = total[row] * factor + sum;
        along[row] = along[row] * factor + with_s;
        spread[row] = squares;
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
  // Relative error of |v|^2 in Gram form: the rounding of one product times sum (a |u|)^2 / |v|^2.
  const A threshold = K::Gram::tensor ? A(0.25) : A(0.02);
  for (int row = warp; row < kTile && t0 + row < p.T; row += kThreads / 32) {
    const int64_t out = b * p.T + t0 + row;
    const bool some = p.pool == Pool::max ? best[row] >= 0 : !(total[row] == A(0));
    if (p.pool == Pool::max) {
      if (lane == 0 && p.best) p.best[i * p.T + t0 + row] = best[row];  // backward: only which patch it was
      if (lane == 0 && !p.best) p.similarity[out] = some ? top[row] : A(0);
      continue;
    }
    if (lane == 0) p.lse[out] = some ? top[row] + log(total[row]) : minus_infinity<A>();
    if (p.pool == Pool::vector && !in_gram) continue;  // pooled_norms_kernel follows
    A phi = some ? along[row] / total[row] : A(0), norm = 0;  // (3)
    if (in_gram && some) {
      A squared = quad[row], unit = longest;
      A dot = along[row];
      if (squared < threshold * spread[row]) {
        pooled_directly(p, i, t0 + row, top[row], scores + row * kScorePitch<A>, squared, dot);
        unit = 1;
      }
      norm = sqrt(squared) * unit / total[row];
      phi = dot * unit / total[row] / larger(norm, kEps<A>);  // (4)
    }
    if (lane == 0) {
      p.similarity[out] = phi;
      if (in_gram) p.norm[out] = norm;
    }
  }
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
  A acc[kAccumulators], squared = 0, dot = 0;
  for (int64_t d0 = 0; d0 < p.D; d0 += kTile) {
    clear<P>(acc);
    product<P>(weight_rows(p, i), t0, p.patch_columns(i), d0, memory, acc);
    store_tile<P>(acc, sums);
    __syncthreads();
    if (threadIdx.x < kTile && t < p.T) {
      for (int64_t d = d0; d < p.D && d < d0 + kTile; ++d) {
        const A v = sums[threadIdx.x * kTilePitch + d - d0];
        squared += v * v;
        dot += v * to_float(p.texts[t * p.text_t + d * p.text_d]);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < kTile && t < p.T) {
    const A norm = sqrt(squared);
    p.norm[b * p.T + t] = norm;
    p.similarity[b * p.T + t] = dot * p.inverse_text(t) / larger(norm, kEps<A>);  // (4)
  }
}

// Backward, pooled-vector form: v itself, of one chunk.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_vectors_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = blockIdx.y * kTile, i = blockIdx.z;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(weight_rows(p, i), t0, p.patch_columns(i), d0, memory, acc);
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t t = t0 + tile_row<P>(k), d = d0 + tile_column<P>(k);
    if (t < p.T && d < p.D) p.vectors[(i * p.T + t) * p.pitch_d + d] = from_float<typename K::W>(acc[k]);
  }
}

// From cosines to the coefficients m with d U = m^T q + .., d q = m U; equations (5)-(8). Also, per tile of texts, the
// sums over texts of the score path along each patch (what the projection onto the sphere takes away again).
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_coefficients_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Cosine;
  using Q = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  A *cosines = reinterpret_cast<A*>(memory + kStages<A>), *sums = reinterpret_cast<A*>(memory);  // [64][kTilePitch] each
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, n0 = blockIdx.y * kTile, i = blockIdx.z, b = p.first + i;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(p.text_rows(), t0, p.patch_rows(i), n0, memory, acc);
  store_tile<P>(acc, cosines);
  if (p.pool == Pool::vector) {  // <u_n, v>
    clear<Q>(acc);
    if (p.gram) {
      const Operand<typename K::W, A> gram = {p.gram_back + i * p.N * p.pitch, p.pitch, 1, p.N, p.N};
      product<Q>(weight_rows(p, i), t0, gram, n0, memory, acc);
    } else {
      const Operand<typename K::W, A> v = {p.vectors + i * p.T * p.pitch_d, p.pitch_d, 1, p.T, p.D};
      product<Q>(v, t0, p.patch_rows(i), n0, memory, acc);
    }
    store_tile<Q>(acc, sums);
  }
  __syncthreads();
  const A scale = *p.scale, longest = larger(p.longest[i], kEps<A>);
  double d_scale = 0, d_bias = 0;
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int row = e / kTile, column = e % kTile, at = row * kTilePitch + column;
    const int64_t t = t0 + row, n = n0 + column;
    A parallel = 0;
    if (t < p.T && n < p.N) {
      const A q_inverse = p.inverse_text(t), r = p.norms[i * p.N + n], r_inverse = p.inverse_norm(i, n);
      const A s = cosines[at] * r_inverse * q_inverse, g = p.grad[b * p.T + t], phi = p.similarity[b * p.T + t];
      A m = 0;
      if (p.kept(b, n)) {
        if (p.pool == Pool::max) {
          const A total = p.best[i * p.T + t] == n ? g : A(0);
          m = total * r_inverse;
          parallel = total * s;
        } else {
          const A a = exp(p.logit(s) - p.lse[b * p.T + t]);
          A c;
          if (p.pool == Pool::score) {
            c = g * a * p.slope(s) * (s - phi);  // (5)
            m = (g * a + scale * c) * r_inverse;
            parallel = (g * a + scale * c) * s;
          } else {
            const A norm = p.norm[b * p.T + t];
            const A rho = A(1) / larger(norm, kEps<A>);
            const A back = norm < kEps<A> ? A(0) : phi * rho * rho;
            const A uv = p.gram ? sums[at] * r * longest : sums[at];
            c = g * a * p.slope(s) * (r * s * rho - back * uv);  // (6)
            m = scale * c * r_inverse + g * a * rho;             // (7)
            parallel = scale * c * s;
          }
          d_scale += static_cast<double>(c) * static_cast<double>(s);
          if (p.weight == Weight::sigmoid) d_bias += static_cast<double>(c);
        }
      }
      p.coefficients[(i * p.T + t) * p.pitch + n] = from_float<typename K::W>(m * q_inverse);
      if (p.pool == Pool::vector && n == 0) {  // once a text: the weights of H in (8)
        const A norm = p.norm[b * p.T + t];
        p.factors[i * p.T + t] = norm < kEps<A> ? A(0) : -g * phi / (norm * norm);
      }
    }
    sums[at] = parallel;
  }
  __syncthreads();
  if (threadIdx.x < kTile && n0 + threadIdx.x < p.N) {
    A sum = 0;
    for (int row = 0; row < kTile; ++row) sum += sums[row * kTilePitch + threadIdx.x];
    p.along[(i * gridDim.x + blockIdx.x) * p.N + n0 + threadIdx.x] = sum;
  }
  __syncthreads();
  double* partial = reinterpret_cast<double*>(memory);
  d_scale = warp_sum(d_scale), d_bias = warp_sum(d_bias);
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32 * 2] = d_scale;
    partial[threadIdx.x / 32 * 2 + 1] = d_bias;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += partial[2 * w + threadIdx.x];
    const int64_t block = (i * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.scalars[2 + 2 * block + threadIdx.x] = sum;  // the first two hold the sum of all chunks
  }
}

// -H of (8), symmetric, for the Gram form: H_nm = sum_t h_t a_tn a_tm.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_hessian_kernel(Args<K> p) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t n0 = blockIdx.x * kTile, m0 = blockIdx.y * kTile, i = blockIdx.z;
  Operand<typename K::W, A> plain = {p.weights + i * p.T * p.pitch, 1, p.pitch, p.N, p.T};
  Operand<typename K::W, A> weighted = plain;
  weighted.k_factor = p.factors + i * p.T;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(weighted, n0, plain, m0, memory, acc);
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t n = n0 + tile_row<P>(k), m = m0 + tile_column<P>(k);
    if (n < p.N && m < p.N) p.hessian[(i * p.N + n) * p.pitch + m] = from_float<typename K::W>(acc[k]);
  }
}

// d U = m^T Q - H U (Gram) or - sum_t h_t a_t v_t (vectors), minus the part along each patch.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_patches_kernel(Args<K> p, int64_t text_tiles) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t n0 = blockIdx.x * kTile, d0 = blockIdx.y * kTile, i = blockIdx.z, b = p.first + i;
  const Operand<typename K::W, A> m = {p.coefficients + i * p.T * p.pitch, 1, p.pitch, p.N, p.T};
  const Operand<typename K::T, A> texts = {p.texts, p.text_d, p.text_t, p.D, p.T};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(m, n0, texts, d0, memory, acc);
  if (p.pool == Pool::vector) {
    if (p.gram) {
      const Operand<typename K::W, A> h = {p.hessian + i * p.N * p.pitch, p.pitch, 1, p.N, p.N};
      product<P>(h, n0, p.patch_columns(i), d0, memory, acc);
    } else {
      Operand<typename K::W, A> a = {p.weights + i * p.T * p.pitch, 1, p.pitch, p.N, p.T};
      a.k_factor = p.factors + i * p.T;
      const Operand<typename K::W, A> v = {p.vectors + i * p.T * p.pitch_d, 1, p.pitch_d, p.D, p.T};
      product<P>(a, n0, v, d0, memory, acc);
    }
  }
  A* along = reinterpret_cast<A*>(memory);
  if (threadIdx.x < kTile && n0 + threadIdx.x < p.N) {
    A sum = 0;
    for (int64_t tile = 0; tile < text_tiles; ++tile) sum += p.along[(i * text_tiles + tile) * p.N + n0 + threadIdx.x];
    const A r = p.norms[i * p.N + n0 + threadIdx.x];
    along[threadIdx.x] = r < kEps<A> ? A(0) : sum / (r * r);  // a norm clamped at eps is a constant: no projection
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int row = tile_row<P>(k);
    const int64_t n = n0 + row, d = d0 + tile_column<P>(k);
    if (n >= p.N || d >= p.D) continue;
    A value = 0;
    if (p.kept(b, n)) value = acc[k] - along[row] * to_float(p.patches[b * p.patch_b + n * p.patch_n + d * p.patch_d]);
    p.grad_patches[(b * p.N + n) * p.D + d] = from_float<typename K::T>(value);
  }
}

// d q of one slot: its images of this chunk, in order, onto what earlier chunks left there.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_texts_kernel(Args<K> p, int64_t images) {
  using A = typename K::A;
  using P = typename K::Back;
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = blockIdx.y * kTile, slot = blockIdx.z;
  A acc[kAccumulators];
  clear<P>(acc);
  for (int64_t i = images * slot / p.slots; i < images * (slot + 1) / p.slots; ++i) {
    const Operand<typename K::W, A> m = {p.coefficients + i * p.T * p.pitch, p.pitch, 1, p.T, p.N};
    product<P>(m, t0, p.patch_columns(i), d0, memory, acc);
  }
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t t = t0 + tile_row<P>(k), d = d0 + tile_column<P>(k);
    if (t >= p.T || d >= p.D) continue;
    A* out = p.slot_texts + (slot * p.T + t) * p.D + d;
    *out = p.first == 0 ? acc[k] : *out + acc[k];
  }
}

// The slots in order, then the projection onto the sphere. One warp a text.
template <typename K>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_finish_kernel(Args<K> p) {
  using A = typename K::A;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (t >= p.T) return;
  const int lane = threadIdx.x % 32;
  A dot = 0;
  for (int64_t d = lane; d < p.D; d += 32) {
    A sum = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot) sum += p.slot_texts[(slot * p.T + t) * p.D + d];
    p.slot_texts[t * p.D + d] = sum;
    dot += sum * to_float(p.texts[t * p.text_t + d * p.text_d]);
  }
  const A inverse = p.inverse_text(t);
  dot = p.text_norms[t] < kEps<A> ? A(0) : warp_sum(dot) * inverse * inverse;
  for (int64_t d = lane; d < p.D; d += 32) {
    const A q = to_float(p.texts[t * p.text_t + d * p.text_d]);
    p.grad_texts[t * p.D + d] = from_float<typename K::T>(p.slot_texts[t * p.D + d] - q * dot);
  }
}

// Sums of the blocks of one chunk in a fixed order, onto those of the chunks before.
template <typename A>
__global__ void __launch_bounds__(kThreads) patch_text_similarity_bwd_scalars_kernel(double* scalars, int64_t blocks, bool first,
                                                                                     A* d_scale, A* d_bias) {
  OVSEG_DYNAMIC_SHARED(memory);
  double* part = reinterpret_cast<double*>(memory);
  const int which = threadIdx.x % 2;
  double sum = 0;
  for (int64_t block = threadIdx.x / 2; block < blocks; block += kThreads / 2) sum += scalars[2 + 2 * block + which];
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < 2) {
    double all = first ? 0 : scalars[threadIdx.x];
    for (int k = threadIdx.x; k < kThreads; k += 2) all += part[k];
    scalars[threadIdx.x] = all;
    *(threadIdx.x == 0 ? d_scale : d_bias) = static_cast<A>(all);
  }
}

template <typename A>
constexpr int kForwardShared = kStages<A> + (kTile * kScorePitch<A> + 5 * kTile) * static_cast<int>(sizeof(A)) + kTile * 4;
static_assert(kForwardShared<float> <= 99 * 1024 && kForwardShared<double> <= 99 * 1024, "what a block of sm_86 to sm_120 has");

template <typename K>
Args<K> arguments(const PatchTextCuda& p, const PatchTextPlan& plan) {
  using A = typename K::A;
  Args<K> x{};
  x.B = p.B, x.T = p.T, x.N = p.N, x.D = p.D, x.pitch = plan.pitch, x.pitch_d = plan.pitch_d;
  x.pool = p.pool, x.weight = p.weight, x.gram = plan.gram, x.slots = plan.slots;
  x.patches = static_cast<const typename K::T*>(p.patches), x.texts = static_cast<const typename K::T*>(p.texts);
  x.patch_b = p.patch_strides[0], x.patch_n = p.patch_strides[1], x.patch_d = p.patch_strides[2];
  x.text_t = p.text_strides[0], x.text_d = p.text_strides[1];
  x.mask = p.mask, x.mask_b = p.mask_strides[0], x.mask_n = p.mask_strides[1];
  x.scale = static_cast<const A*>(p.scale), x.bias = static_cast<const A*>(p.bias);
  x.similarity = static_cast<A*>(p.similarity), x.lse = static_cast<A*>(p.lse), x.norm = static_cast<A*>(p.norm);
  x.grad = static_cast<const A*>(p.grad);
  x.grad_patches = static_cast<typename K::T*>(p.grad_patches);
  x.grad_texts = static_cast<typename K::T*>(p.grad_texts);
  auto at = [&](size_t offset) { return p.workspace + offset; };
  x.norms = reinterpret_cast<A*>(at(plan.norms)), x.longest = reinterpret_cast<A*>(at(plan.longest));
  x.text_norms = reinterpret_cast<A*>(at(plan.text_norms));
  x.gram_matrix = reinterpret_cast<typename K::G*>(at(plan.gram_matrix));
  x.gram_back = reinterpret_cast<typename K::W*>(at(plan.gram_matrix));
  x.weights = reinterpret_cast<typename K::W*>(at(plan.weights));
  x.vectors = reinterpret_cast<typename K::W*>(at(plan.vectors));
  x.coefficients = reinterpret_cast<typename K::W*>(at(plan.coefficients));
  x.hessian = reinterpret_cast<typename K::W*>(at(plan.hessian));
  x.along = reinterpret_cast<A*>(at(plan.along)), x.factors = reinterpret_cast<A*>(at(plan.factors));
  x.slot_texts = reinterpret_cast<A*>(at(plan.slot_texts));
  x.best = p.grad && p.pool == Pool::max ? reinterpret_cast<int32_t*>(at(plan.best)) : nullptr;
  x.scalars = reinterpret_cast<double*>(at(plan.scalars));
  return x;
}

unsigned tiles(int64_t n) { return static_cast<unsigned>(ceil_div(n, kTile)); }

template <typename K>
const char* prepare(Args<K>& x, const PatchTextCuda& p, int64_t images) {
  if (x.first == 0) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.T, kThreads / 32));
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_text_norms_kernel<K>, blocks, kThreads, 0, p.stream, x));
  }
  const unsigned count = static_cast<unsigned>(images);
  return OVSEG_LAUNCH(patch_text_similarity_patch_norms_kernel<K>, count, kThreads, 64, p.stream, x);
}

template <typename K>
const char* weights(Args<K>& x, const PatchTextCuda& p, unsigned images) {
  const dim3 grid(tiles(p.T), tiles(p.N), images);
  return OVSEG_LAUNCH(patch_text_similarity_weights_kernel<K>, grid, kThreads, kStages<typename K::A>, p.stream, x);
}

template <typename K>
const char* forward(const PatchTextCuda& p) {
  using A = typename K::A;
  const PatchTextPlan plan = patch_text_plan(p, false);
  Args<K> x = arguments<K>(p, plan);
  for (x.first = 0; x.first < p.B; x.first += plan.chunk) {
    const unsigned images = static_cast<unsigned>(p.B - x.first < plan.chunk ? p.B - x.first : plan.chunk);
    OVSEG_TRY(prepare(x, p, images));
    if (p.pool == Pool::vector && plan.gram) {
      const dim3 grid(tiles(p.N), tiles(p.N), images);
      OVSEG_TRY(OVSEG_LAUNCH((patch_text_similarity_gram_kernel<K, typename K::G>), grid, kThreads, kStageBytes, p.stream, x,
                             x.gram_matrix));
    }
    const dim3 grid(tiles(p.T), 1, images);
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_fwd_kernel<K>, grid, kThreads, kForwardShared<A>, p.stream, x));
    if (p.pool != Pool::vector || plan.gram) continue;
    OVSEG_TRY(weights(x, p, images));
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_pooled_norms_kernel<K>, grid, kThreads, kStages<A>, p.stream, x));
  }
  return nullptr;
}

template <typename K>
const char* backward(const PatchTextCuda& p) {
  using A = typename K::A;
  const PatchTextPlan plan = patch_text_plan(p, true);
  Args<K> x = arguments<K>(p, plan);
  for (x.first = 0; x.first < p.B; x.first += plan.chunk) {
    const unsigned images = static_cast<unsigned>(p.B - x.first < plan.chunk ? p.B - x.first : plan.chunk);
    const dim3 square(tiles(p.N), tiles(p.N), images), cosines(tiles(p.T), tiles(p.N), images);
    OVSEG_TRY(prepare(x, p, images));
    if (p.pool == Pool::max) {  // which patch it was
      const dim3 grid(tiles(p.T), 1, images);
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_fwd_kernel<K>, grid, kThreads, kForwardShared<A>, p.stream, x));
    }
    if (p.pool == Pool::vector) {
      OVSEG_TRY(weights(x, p, images));
      if (plan.gram) {
        OVSEG_TRY(OVSEG_LAUNCH((patch_text_similarity_gram_kernel<K, typename K::W>), square, kThreads, kStageBytes, p.stream,
                               x, x.gram_back));
      } else {
        const dim3 grid(tiles(p.T), tiles(p.D), images);
        OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_vectors_kernel<K>, grid, kThreads, kStageBytes, p.stream, x));
      }
    }
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_coefficients_kernel<K>, cosines, kThreads, kStages<A> + kSumBytes<A>, p.stream,
                           x));
    const int64_t blocks = static_cast<int64_t>(cosines.x) * cosines.y * images;
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_scalars_kernel<A>, 1, kThreads, kThreads * 8, p.stream, x.scalars, blocks,
                           x.first == 0, static_cast<A*>(p.grad_scale), static_cast<A*>(p.grad_bias)));
    if (p.grad_patches) {
      if (p.pool == Pool::vector && plan.gram) {
        OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_hessian_kernel<K>, square, kThreads, kStageBytes, p.stream, x));
      }
      const dim3 grid(tiles(p.N), tiles(p.D), images);
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_patches_kernel<K>, grid, kThreads, kStageBytes, p.stream, x,
                             static_cast<int64_t>(tiles(p.T))));
    }
    if (p.grad_texts) {
      const dim3 grid(tiles(p.T), tiles(p.D), static_cast<unsigned>(plan.slots));
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_texts_kernel<K>, grid, kThreads, kStageBytes, p.stream, x,
                             static_cast<int64_t>(images)));
    }
  }
  if (!p.grad_texts) return nullptr;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.T, kThreads / 32));
  return OVSEG_LAUNCH(patch_text_similarity_bwd_finish_kernel<K>, blocks, kThreads, 0, p.stream, x);
}

}  // namespace

PatchTextPlan patch_text_plan(const PatchTextCuda& p, bool backward) {
  const bool wide = p.type == Type::float64;
  const int64_t a = wide ? 8 : 4, w = wide ? 8 : p.type == Type::bfloat16 ? 2 : 4;
  PatchTextPlan plan{};
  plan.gram = p.N <= (wide ? kWindow<double> : kWindow<float>);
  plan.pitch = round_up(p.N, 8), plan.pitch_d = round_up(p.D, 8);
  const bool vector = p.pool == Pool::vector, pooled = vector && !plan.gram;
  const int64_t text_tiles = ceil_div(p.T, kTile), patch_tiles = ceil_div(p.N, kTile);
  const int64_t gram_size = vector && plan.gram ? p.N * plan.pitch * w : 0;
  const int64_t weight_size = pooled || (backward && vector) ? p.T * plan.pitch * w : 0;
  const int64_t vector_size = backward && pooled ? p.T * plan.pitch_d * w : 0;
  const int64_t coefficient_size = backward ? p.T * plan.pitch * w : 0;
  const int64_t along_size = backward ? text_tiles * p.N * a : 0;
  const int64_t scalar_size = backward ? 16 * text_tiles * patch_tiles : 0;
  const int64_t per_image = 2 * gram_size + weight_size + vector_size + coefficient_size + along_size + scalar_size + 1;
  const int64_t limit = (int64_t(64) << 20) / per_image;
  plan.chunk = limit < 1 ? 1 : limit > 65535 ? 65535 : limit;
  if (plan.chunk > p.B) plan.chunk = p.B < 1 ? 1 : p.B;
  // Enough blocks for a large GPU where texts and channels alone do not give them.
  const int64_t owners = text_tiles * ceil_div(p.D, kTile), wanted = ceil_div(256, owners);
  plan.slots = wanted < plan.chunk ? wanted : plan.chunk;
  if (plan.slots > 16) plan.slots = 16;
  size_t bytes = 0;
  auto take = [&](int64_t size) {
    const size_t at = bytes;
    bytes += static_cast<size_t>(round_up(size, 256));
    return at;
  };
  plan.norms = take(plan.chunk * p.N * a);
  plan.longest = take(plan.chunk * a);
  plan.text_norms = take(p.T * a);
  plan.gram_matrix = take(plan.chunk * gram_size);
  plan.hessian = take(backward ? plan.chunk * gram_size : 0);
  plan.weights = take(plan.chunk * weight_size);
  plan.vectors = take(plan.chunk * vector_size);
  plan.coefficients = take(plan.chunk * coefficient_size);
  plan.along = take(plan.chunk * along_size);
  plan.factors = take(backward && vector ? plan.chunk * p.T * a : 0);
  plan.best = take(backward && p.pool == Pool::max ? plan.chunk * p.T * 4 : 0);
  plan.scalars = take(backward ? 16 + plan.chunk * scalar_size : 0);
  plan.slot_texts = take(backward ? plan.slots * p.T * p.D * a : 0);
  plan.bytes = bytes;
  return plan;
}

#define OVSEG_DISPATCH(function)                                   \
  switch (p.type) {                                                \
    case Type::float64:                                            \
      return function<Float64>(p);                                 \
    case Type::float16:                                            \
      return function<Float16>(p);                                 \
    case Type::bfloat16:                                           \
      return function<BFloat16>(p);                                \
    default:                                                       \
      return p.tf32 ? function<Float32Fast>(p) : function<Float32>(p); \
  }

const char* patch_text_forward(const PatchTextCuda& p) { OVSEG_DISPATCH(forward) }
const char* patch_text_backward(const PatchTextCuda& p) { OVSEG_DISPATCH(backward) }

}  // namespace ovseg
