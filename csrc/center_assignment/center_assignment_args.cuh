// center_assignment on CUDA: kinds of arithmetic, and what all kernels take.
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
  __device__ A factor(int64_t b, int64_t l) const { return p.key_scale ? p.scale * p.key_scale[b * p.L + l] : p.scale; }
  __device__ A score(int64_t b, int64_t g, int64_t l, A raw) const {  // (1)
    return factor(b, l) * raw + (p.center_bias ? p.center_bias[b * p.G + g] : A(0));
  }
  __device__ A divisor(A count) const {  // (4)
    if (p.normalizer == Normalizer::sum) return A(1);
    if (p.normalizer == Normalizer::mean_plus_one) return count + A(1);
    return count < A(1) ? A(1) : count;
  }
  // d pooled / n of center i = (b, g), by a warp; returns its rho / n of (6), less the gradient of its count.
  __device__ A scale_upstream(int64_t i, A* scaled) const {
    const A count = p.count[i], inverse = A(1) / divisor(count);
    A rho = 0;
    for (int64_t e = threadIdx.x % 32; e < p.E; e += 32) {
      const A value = p.grad[i * p.E + e] * inverse;
      scaled[e] = value;
      rho += p.pooled[i * p.E + e] * value;
    }
    rho = warp_sum(rho);
    const bool constant = p.normalizer == Normalizer::sum || (p.normalizer == Normalizer::mean && count < A(1));
    return (constant ? A(0) : rho) - (p.grad_count ? p.grad_count[i] : A(0));
  }
};

// Neighbouring elements that one instruction moves.
template <typename X, int count>
struct alignas(count * sizeof(X) < 16 ? count * sizeof(X) : 16) Pack {
  X x[count];
};

template <typename K>
CenterArgs<K> arguments(const CenterCuda<typename K::A>& x, bool backward) {
  CenterArgs<K> args{};
  static_cast<CenterBuffers<typename K::A>&>(args) = center_buffers(x.p, backward, x.workspace);
  args.p = x.p;
  return args;
}

}  // namespace
}  // namespace ovseg
