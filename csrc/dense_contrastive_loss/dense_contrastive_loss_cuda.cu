// dense_contrastive_loss on CUDA, sm_80 and newer. Selection: a block owns 64 texts and a share of the pixels; their
// similarities meet in shared memory, where one thread a text keeps a sorted list of the best. The order of candidates
// is total, so the merged lists do not depend on the shares. Similarities of 16-bit pixels are tf32 products, others
// exact. Equation numbers: ovseg_kernels/ops/dense_contrastive_loss.py.
#include "../common/philox.h"
#include "../common/tile.cuh"
#include "dense_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

template <typename P_, typename T_>
struct DenseKind {
  using P = P_;
  using T = T_;
  using A = typename P_::Sum;
};

constexpr int64_t kMostShares = 64;

template <typename A>
struct Lists {
  DenseCuda<A> x;
  bool positives;      // own images, by (2); else all others, by (3)
  int64_t capacity;    // k_pos, or k_neg + skip
  int64_t shares;      // of the pixels
  A* inverse;          // [B N]
  A* lowest;           // [T]
  Selected<A>* lists;  // [shares, T, capacity]
  int32_t* lengths;    // [shares, T]
  int32_t* cursors;    // [shares, T]
};

template <typename A>
__device__ A infinite() {
  return static_cast<A>(INFINITY);
}

template <typename K>
__device__ const typename K::T* row_of(const DenseParams<typename K::A>& p, int64_t index) {
  return static_cast<const typename K::T*>(p.pixels) + index * p.strides[1];
}

// 1 / max(|u|, eps) of a pixel, by a warp.
template <typename K>
__device__ typename K::A inverse_norm(const DenseParams<typename K::A>& p, int64_t index) {
  using A = typename K::A;
  const typename K::T* u = row_of<K>(p, index);
  A sum = 0;
  for (int64_t d = threadIdx.x % 32; d < p.D; d += 32) {
    const A value = to_float(u[d * p.strides[2]]);
    sum += value * value;
  }
  const A norm = sqrt(warp_sum(sum));
  return A(1) / (norm < A(1e-12) ? A(1e-12) : norm);
}

template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_select_norms_kernel(Lists<typename K::A> c) {
  const int64_t x = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (x >= c.x.p.B * c.x.p.N) return;
  const typename K::A inverse = inverse_norm<K>(c.x.p, x);
  if (threadIdx.x % 32 == 0) c.inverse[x] = inverse;
}

// The key of pixel x for text j; -infinity: not eligible.
template <typename A>
__device__ A key_of(const Lists<A>& c, int64_t j, int64_t x, A s) {
  const DenseParams<A>& p = c.x.p;
  if (own(p, x / p.N, j) != c.positives) return minus_infinity<A>();
  if (!c.positives) {
    if (p.sampling == Sampling::semi) {
      return s < c.lowest[j] && s >= c.lowest[j] - p.margin ? s : minus_infinity<A>();
    }
    if (p.sampling != Sampling::topk) {
      const uint32_t bits = philox_bits(p.rng[0], p.rng[1], j * p.B * p.N + x);
      if (p.sampling == Sampling::random) return static_cast<A>(uniform_from_bits(bits));
      s = s * p.inverse_temperature + static_cast<A>(gumbel_from_bits(bits));
    }
  }
  return s != s ? infinite<A>() : s;
}

template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_select_lists_kernel(Lists<typename K::A> c) {
  using A = typename K::A;
  using P = typename K::P;
  OVSEG_DYNAMIC_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory + kStageBytes);
  int* wanted = reinterpret_cast<int*>(tile + kTile * kTilePitch);
  const DenseParams<A>& p = c.x.p;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) * kTile, j = j0 + threadIdx.x, all = p.B * p.N;
  const int64_t tiles = ceil_div(all, kTile), each = ceil_div(tiles, c.shares);
  const int64_t begin = blockIdx.y * each, end = begin + each < tiles ? begin + each : tiles;
  const Operand<A, A> texts = {p.texts, p.D, 1, p.T, p.D};
  const Operand<typename K::T, A> pixels = {static_cast<const typename K::T*>(p.pixels), p.strides[1], p.strides[2],
                                            all, p.D};
  const bool mine = threadIdx.x < kTile && j < p.T;
  Selected<A>* list = c.lists + (blockIdx.y * p.T + j) * c.capacity;
  int64_t length = 0;
  A threshold = minus_infinity<A>();
  for (int64_t t = begin; t < end; ++t) {
    const int64_t x0 = t * kTile, x1 = x0 + kTile < all ? x0 + kTile : all;
    if (c.positives) {  // most tiles hold no pair of a text with its own image
      int any = 0;
      for (int64_t i = x0 / p.N; mine && i <= (x1 - 1) / p.N; ++i) any |= own(p, i, j);
      if (threadIdx.x == 0) *wanted = 0;
      __syncthreads();
      if (any) *wanted = 1;
      __syncthreads();
      any = *wanted;
      __syncthreads();
      if (!any) continue;
    }
    A acc[kAccumulators];
    clear<P>(acc);
    product<P>(texts, j0, pixels, x0, memory, acc);
    store_tile<P>(acc, tile);
    __syncthreads();
    for (int64_t x = x0; mine && x < x1; ++x) {
      const A key = key_of(c, j, x, tile[threadIdx.x * kTilePitch + (x - x0)] * c.inverse[x]);
      if (key <= threshold) continue;  // pixels come by rising index: of equals the first stays
      int64_t at = length < c.capacity ? length++ : c.capacity - 1;
      for (; at > 0 && list[at - 1].key < key; --at) list[at] = list[at - 1];
      list[at] = {key, x};
      if (length == c.capacity) threshold = list[length - 1].key;
    }
    __syncthreads();
  }
  if (mine) c.lengths[blockIdx.y * p.T + j] = static_cast<int32_t>(length);
}

// The best of all shares, best first: one thread a text.
template <typename A>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_select_merge_kernel(Lists<A> c) {
  const DenseParams<A>& p = c.x.p;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.T) return;
  for (int64_t s = 0; s < c.shares; ++s) c.cursors[s * p.T + j] = 0;
  const int64_t skip = c.positives ? 0 : p.skip;
  int64_t* out = c.positives ? p.positive + j * p.k_pos : p.negative + j * p.k_neg;
  A last = infinite<A>();
  for (int64_t k = 0; k < c.capacity; ++k) {
    int64_t best = -1;
    Selected<A> found = {minus_infinity<A>(), -1};
    for (int64_t s = 0; s < c.shares; ++s) {  // shares hold rising indices: of equals the first share wins
      const int32_t at = c.cursors[s * p.T + j];
      if (at >= c.lengths[s * p.T + j]) continue;
      const Selected<A> head = c.lists[(s * p.T + j) * c.capacity + at];
      if (best < 0 || head.key > found.key) best = s, found = head;
    }
    if (best >= 0) ++c.cursors[best * p.T + j], last = found.key;
    if (k >= skip) out[k - skip] = found.index;
  }
  if (c.positives) c.lowest[j] = last;
}

// Similarity of every selected pixel, and the unit vectors of the first ones: one warp an entry.
template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_fwd_gather_kernel(DenseCuda<typename K::A> x) {
  using A = typename K::A;
  const DenseParams<A>& p = x.p;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (entry >= p.T * p.K) return;
  const int64_t index = p.index[entry], j = entry / p.K, k = entry % p.K;
  A* unit = k < p.rows ? p.unit + (j * p.rows + k) * p.D : nullptr;
  const A inverse = index < 0 ? A(0) : inverse_norm<K>(p, index);
  A sum = 0;
  for (int64_t d = lane; d < p.D; d += 32) {
    const A u = index < 0 ? A(0) : inverse * to_float(row_of<K>(p, index)[d * p.strides[2]]);
    sum += u * p.texts[j * p.D + d];
    if (unit) unit[d] = u;
  }
  sum = warp_sum(sum);
  if (lane == 0) p.similarity[entry] = sum;
}

// 1 / |u| of every entry, 0 where there is none.
template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_bwd_norms_kernel(DenseCuda<typename K::A> x) {
  using A = typename K::A;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (entry >= x.p.T * x.p.K) return;
  const int64_t index = x.p.index[entry];
  const A inverse = index < 0 ? A(0) : inverse_norm<K>(x.p, index);
  if (threadIdx.x % 32 == 0) reinterpret_cast<A*>(x.workspace)[entry] = inverse;
}

// (9): one block a text, one thread a channel.
template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_bwd_texts_kernel(DenseCuda<typename K::A> x) {
  using A = typename K::A;
  const DenseParams<A>& p = x.p;
  const A* inverse = reinterpret_cast<const A*>(x.workspace);
  const int64_t j = blockIdx.x;
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    A sum = 0;
    for (int64_t e = j * p.K; p.grad_similarity && e < (j + 1) * p.K; ++e) {
      if (p.index[e] < 0) continue;
      sum += p.grad_similarity[e] * inverse[e] * to_float(row_of<K>(p, p.index[e])[d * p.strides[2]]);
    }
    p.grad_texts[j * p.D + d] = sum;
  }
}

// v of (8) at channel d, over the entries of one pixel from e on.
template <typename A>
__device__ A upstream(const DenseParams<A>& p, int64_t e, int64_t index, int64_t d) {
  A v = 0;
  for (; e < p.T * p.K && p.index[p.order[e]] == index; ++e) {
    const int64_t entry = p.order[e], j = entry / p.K, k = entry % p.K;
    if (p.grad_similarity) v += p.grad_similarity[entry] * p.texts[j * p.D + d];
    if (p.grad_unit && k < p.rows) v += p.grad_unit[(j * p.rows + k) * p.D + d];
  }
  return v;
}

// (8): one warp a pixel, at its first entry.
template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_bwd_pixels_kernel(DenseCuda<typename K::A> x) {
  using A = typename K::A;
  const DenseParams<A>& p = x.p;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e >= p.T * p.K) return;
  const int64_t index = p.index[p.order[e]];
  if (index < 0 || (e > 0 && p.index[p.order[e - 1]] == index)) return;
  const A inverse = reinterpret_cast<const A*>(x.workspace)[p.order[e]];
  const typename K::T* u = row_of<K>(p, index);
  A along = 0;
  for (int64_t d = lane; d < p.D; d += 32) along += upstream(p, e, index, d) * to_float(u[d * p.strides[2]]);
  along = warp_sum(along) * inverse * inverse;
  if (!(inverse < A(1e12))) along = 0;  // a clamped norm: u / eps has no radial part to remove
  for (int64_t d = lane; d < p.D; d += 32) {
    const A value = inverse * (upstream(p, e, index, d) - along * to_float(u[d * p.strides[2]]));
    static_cast<typename K::T*>(p.grad_pixels)[index * p.D + d] = from_float<typename K::T>(value);
  }
}

template <typename A>
Lists<A> plan(const DenseCuda<A>& x, size_t* bytes) {
  const DenseParams<A>& p = x.p;
  Lists<A> c{};
  c.x = x;
  const int64_t wanted = ceil_div(256, ceil_div(p.T < 1 ? 1 : p.T, kTile)), most = ceil_div(p.B * p.N, kTile);
  c.shares = wanted < most ? wanted : most < 1 ? 1 : most;
  if (c.shares > kMostShares) c.shares = kMostShares;
  const int64_t capacity = p.k_pos > p.k_neg + p.skip ? p.k_pos : p.k_neg + p.skip;
  unsigned char* at = x.workspace;
  size_t used = 0;
  auto take = [&](int64_t size) {
    unsigned char* found = at ? at + used : nullptr;
    used += static_cast<size_t>(round_up(size, 256));
    return found;
  };
  c.inverse = reinterpret_cast<A*>(take(p.B * p.N * static_cast<int64_t>(sizeof(A))));
  c.lowest = reinterpret_cast<A*>(take(p.T * static_cast<int64_t>(sizeof(A))));
  c.lists = reinterpret_cast<Selected<A>*>(take(c.shares * p.T * capacity * static_cast<int64_t>(sizeof(Selected<A>))));
  c.lengths = reinterpret_cast<int32_t*>(take(c.shares * p.T * 4));
  c.cursors = reinterpret_cast<int32_t*>(take(c.shares * p.T * 4));
  if (bytes) *bytes = used;
  return c;
}

unsigned warps(int64_t count) { return static_cast<unsigned>(ceil_div(count, kThreads / 32)); }

template <typename K>
const char* select(const DenseCuda<typename K::A>& x) {
  using A = typename K::A;
  const DenseParams<A>& p = x.p;
  Lists<A> c = plan(x, nullptr);
  if (p.T == 0) return nullptr;
  if (p.B * p.N > 0) {
    OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_norms_kernel<K>, warps(p.B * p.N), kThreads, 0, x.stream, c));
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.T, kTile)), static_cast<unsigned>(c.shares));
  const unsigned texts = static_cast<unsigned>(ceil_div(p.T, kThreads));
  const size_t shared = kStageBytes + kTile * kTilePitch * sizeof(A) + 16;
  for (int pass = 0; pass < 2; ++pass) {
    c.positives = pass == 0, c.capacity = c.positives ? p.k_pos : p.k_neg + p.skip;
    OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_lists_kernel<K>, grid, kThreads, shared, x.stream, c));
    OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_merge_kernel<A>, texts, kThreads, 0, x.stream, c));
  }
  return nullptr;
}

template <typename K>
const char* gather(const DenseCuda<typename K::A>& x) {
  if (x.p.T * x.p.K == 0) return nullptr;
  return OVSEG_LAUNCH(dense_contrastive_loss_fwd_gather_kernel<K>, warps(x.p.T * x.p.K), kThreads, 0, x.stream, x);
}

template <typename K>
const char* backward(const DenseCuda<typename K::A>& x) {
  const auto& p = x.p;
  if (p.T * p.K == 0) return nullptr;
  const unsigned entries = warps(p.T * p.K);
  OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_bwd_norms_kernel<K>, entries, kThreads, 0, x.stream, x));
  if (p.grad_texts) {
    const unsigned texts = static_cast<unsigned>(p.T);
    OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_bwd_texts_kernel<K>, texts, kThreads, 0, x.stream, x));
  }
  if (!p.grad_pixels) return nullptr;
  return OVSEG_LAUNCH(dense_contrastive_loss_bwd_pixels_kernel<K>, entries, kThreads, 0, x.stream, x);
}

}  // namespace

template <typename A>
size_t dense_select_workspace(const DenseParams<A>& p) {
  DenseCuda<A> x{};
  x.p = p;
  size_t bytes = 0;
  plan(x, &bytes);
  return bytes;
}
template <typename A>
size_t dense_backward_workspace(const DenseParams<A>& p) {
  return p.T * p.K * sizeof(A);
}
template size_t dense_select_workspace(const DenseParams<float>&);
template size_t dense_select_workspace(const DenseParams<double>&);
template size_t dense_backward_workspace(const DenseParams<float>&);
template size_t dense_backward_workspace(const DenseParams<double>&);

#define OVSEG_DENSE(name, function)                                                  \
  template <>                                                                        \
  const char* name(const DenseCuda<double>& x) {                                     \
    return function<DenseKind<Exact<double>, double>>(x);                            \
  }                                                                                  \
  template <>                                                                        \
  const char* name(const DenseCuda<float>& x) {                                      \
    if (x.p.type == Type::float16) return function<DenseKind<Tf32, half>>(x);        \
    return x.p.type == Type::bfloat16 ? function<DenseKind<Tf32, bfloat16>>(x)       \
                                      : function<DenseKind<Exact<float>, float>>(x); \
  }
OVSEG_DENSE(dense_select, select)
OVSEG_DENSE(dense_gather, gather)
OVSEG_DENSE(dense_backward, backward)

}  // namespace ovseg
