// patch_text_similarity on CUDA: the kernels of the backward. Equation numbers:
// ovseg_kernels/ops/patch_text_similarity.py.
#pragma once
#include "patch_text_similarity_fwd.cuh"

namespace ovseg {
namespace {

// Backward, pooled-vector form: v / |v| of one chunk.
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
    if (t >= p.T || d >= p.D) continue;
    const A unit = acc[k] / larger(p.norm[(p.first + i) * p.T + t], kEps<A>);
    p.vectors[(i * p.T + t) * p.pitch_d + d] = from_float<typename K::W>(unit);
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
  A *cosines = reinterpret_cast<A*>(memory + kStages<A>),
    *sums = reinterpret_cast<A*>(memory);  // [64][kTilePitch] each
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * kTile, n0 = blockIdx.y * kTile, i = blockIdx.z, b = p.first + i;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(p.text_rows(), t0, p.patch_rows(i), n0, memory, acc);
  store_tile<P>(acc, cosines);
  if (p.pool == Pool::vector) {  // <u_n, v>, or that by |v|
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
            // Lengths meet 1 / |v| before they meet each other: their product may have no place in A.
            const A back = norm < kEps<A> ? A(0) : phi, length = r * rho;
            const A uv = p.gram ? sums[at] * length * (longest * rho) : sums[at] * rho;
            c = g * a * p.slope(s) * (length * s - back * uv);  // (6)
            m = scale * c * r_inverse + g * a * rho;            // (7)
            parallel = scale * c * s;
          }
          d_scale += static_cast<double>(c) * static_cast<double>(s);
          if (p.weight == Weight::sigmoid) d_bias += static_cast<double>(c);
        }
      }
      p.coefficients[(i * p.T + t) * p.pitch + n] = from_float<typename K::W>(m * q_inverse);
      if (p.pool == Pool::vector && n == 0) {  // once a text: the weights of H in (8), or of v / |v|
        const A norm = p.norm[b * p.T + t], rho = A(1) / norm;
        p.factors[i * p.T + t] = norm < kEps<A> ? A(0) : -g * phi * rho * (p.gram ? rho : A(1));
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
  double both[2] = {d_scale, d_bias};
  block_sum<kThreads>(both, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) {
    const int64_t block = (i * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.scalars[2 + 2 * block] = both[0], p.scalars[3 + 2 * block] = both[1];  // the first two: the sum of all chunks
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

// d U = m^T Q - H U (Gram) or - sum_t h_t |v_t| a_t v_t / |v_t| (vectors), minus the part along each patch.
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
    along[threadIdx.x] = r < kEps<A> ? A(0) : sum / r / r;  // a norm clamped at eps is a constant: no projection
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
__global__ void __launch_bounds__(kThreads)
    patch_text_similarity_bwd_scalars_kernel(double* scalars, int64_t blocks, bool first, A* d_scale, A* d_bias) {
  OVSEG_DYNAMIC_SHARED(memory);
  double sum[2] = {0, 0};
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    sum[0] += scalars[2 + 2 * block], sum[1] += scalars[3 + 2 * block];
  }
  block_sum<kThreads>(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) scalars[k] = sum[k] += first ? 0 : scalars[k];
    *d_scale = static_cast<A>(sum[0]), *d_bias = static_cast<A>(sum[1]);
  }
}

}  // namespace
}  // namespace ovseg
