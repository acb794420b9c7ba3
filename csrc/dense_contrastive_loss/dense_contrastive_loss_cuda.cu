// dense_contrastive_loss on CUDA, sm_80 and newer. Selection: similarities of a chunk of pixels with all texts go
// through memory, a product that fills the GPU whatever the number of texts; then one block a text walks its row of
// them and keeps what beats the worst of its best, sorted whenever its room is full. The order of candidates is total,
// so what is selected of the similarities depends on neither chunks nor threads. Those of 16-bit pixels are a library's
// product with texts of twice as many bits, in two halves; others are exact.
// Equation numbers: ovseg_kernels/ops/dense_contrastive_loss.py.
#include <type_traits>

#include "../common/block.cuh"
#include "../common/device_workspace.h"
#include "../common/philox.h"
#include "../common/tile.cuh"
#include "dense_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

template <typename T_>
struct DenseKind {
  using T = T_;
  using A = std::conditional_t<std::is_same_v<T_, double>, double, float>;
  using P = Exact<A>;
  static constexpr bool kHalves = sizeof(T_) == 2;  // the similarities are a library's product
};

constexpr unsigned kSelectThreads = 256;
constexpr int kInFlight = 4;  // loads of a thread of the selection
constexpr int kSelectStep = static_cast<int>(kSelectThreads) * kInFlight;
constexpr int64_t kMostShared = 97 * 1024;

// Candidates of one text, in any order until they are sorted.
template <typename A>
struct Best {
  A* keys;
  int64_t* indices;

  // The total order: by key, then by the smaller index.
  __device__ bool before(int i, int j) const {
    return keys[i] > keys[j] || (keys[i] == keys[j] && indices[i] < indices[j]);
  }
  __device__ void put(int i, A key, int64_t index) const { keys[i] = key, indices[i] = index; }
  __device__ void swap(int i, int j) const {
    const A key = keys[i];
    const int64_t index = indices[i];
    put(i, keys[j], indices[j]);
    put(j, key, index);
  }
};

template <typename A>
struct Selection {
  DenseCuda<A> x;
  int64_t chunk;         // pixels that fit into a row of `similarity`
  int64_t first, count;  // pixels of this chunk
  bool own_only;         // similarities of texts with their own images suffice
  A* inverse;            // [B N]
  A* similarity;         // [T, chunk], of the kernel below
  A* lowest;             // [T]
  // What the selection reads: rows of texts, `pitch` apart; with halves the rows of the lower ones come `lower` behind
  // those of the higher, and the lengths of the pixels are still to be divided by.
  const A* read;
  int64_t pitch, lower;

  // Of the positives, or of the negatives.
  struct Side {
    bool positives;    // own images, by (2); else all others, by (3)
    int64_t capacity;  // k_pos, or k_neg + skip, or all pixels
    int64_t room;      // of candidates: a power of two, the capacity and a step of the walk at least
    Best<A> kept;      // [T, capacity], from chunk to chunk
    int32_t* lengths;  // [T]
    Best<A> memory;    // [T, room] where shared memory is too small

    int64_t shared_bytes() const { return 16 + room * static_cast<int64_t>(sizeof(A) + sizeof(int64_t)); }
  } side[2];

  __host__ __device__ bool last() const { return first + count == x.p.B * x.p.N; }
  __host__ __device__ bool several() const { return chunk < x.p.B * x.p.N; }
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
  const A norm = warp_norm<A>(row_of<K>(p, index), p.strides[2], p.D);
  return A(1) / (norm < A(1e-12) ? A(1e-12) : norm);
}

// The texts as the sum of two numbers of the pixels' type: the higher halves, and then what they leave.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dense_contrastive_loss_select_halves_kernel(const float* texts, T* halves, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const T high = from_float<T>(texts[i]);
  halves[i] = high;
  halves[count + i] = from_float<T>(texts[i] - to_float(high));
}

template <typename K>
__global__ void __launch_bounds__(kThreads) dense_contrastive_loss_select_norms_kernel(Selection<typename K::A> c) {
  const int64_t x = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (x >= c.x.p.B * c.x.p.N) return;
  const typename K::A inverse = inverse_norm<K>(c.x.p, x);
  if (threadIdx.x % 32 == 0) c.inverse[x] = inverse;
}

// (1) for 64 texts and 64 pixels of the chunk.
template <typename K>
__global__ void __launch_bounds__(kThreads)
    dense_contrastive_loss_select_similarity_kernel(Selection<typename K::A> c) {
  using A = typename K::A;
  using P = typename K::P;
  OVSEG_DYNAMIC_SHARED(memory);
  const DenseParams<A>& p = c.x.p;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) * kTile, end = c.first + c.count;
  const int64_t x0 = c.first + static_cast<int64_t>(blockIdx.y) * kTile, x1 = x0 + kTile < end ? x0 + kTile : end;
  if (c.own_only) {  // most tiles hold no pair of a text with its own image
    const int64_t j = j0 + threadIdx.x;
    int any = 0;
    for (int64_t i = x0 / p.N; threadIdx.x < kTile && j < p.T && i <= (x1 - 1) / p.N; ++i) any |= own(p, i, j);
    if (block_max<kThreads>(any, reinterpret_cast<int*>(memory)) == 0) return;
  }
  const Operand<A, A> texts = {p.texts, p.D, 1, p.T, p.D};
  const Operand<typename K::T, A> pixels = {static_cast<const typename K::T*>(p.pixels), p.strides[1], p.strides[2],
                                            end, p.D};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(texts, j0, pixels, x0, memory, acc);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t j = j0 + tile_row<P>(i), x = x0 + tile_column<P>(i);
    if (j < p.T && x < end) c.similarity[j * c.chunk + (x - c.first)] = acc[i] * c.inverse[x];
  }
}

// The key of pixel x for text j, which has passed by own(); -infinity: not eligible.
template <typename A>
__device__ A key_of(const Selection<A>& c, bool positives, int64_t j, int64_t x, A lowest) {
  const DenseParams<A>& p = c.x.p;
  const int64_t at = j * c.pitch + (x - c.first);
  A s = c.read[at];
  if (c.lower) s = (s + c.read[at + c.lower]) * c.inverse[x];
  if (!positives && p.sampling != Sampling::topk) {
    if (p.sampling == Sampling::semi) return s < lowest && s >= lowest - p.margin ? s : minus_infinity<A>();
    const uint32_t bits = philox_bits(p.rng[0], p.rng[1], j * p.B * p.N + x);
    if (p.sampling == Sampling::random) return static_cast<A>(uniform_from_bits(bits));
    s = s * p.inverse_temperature + static_cast<A>(gumbel_from_bits(bits));
  }
  return s != s ? infinite<A>() : s;
}

// Bitonic, by the block: best first. Room up to the next power of two is overwritten.
template <typename A>
__device__ void sort(const Best<A>& best, int length) {
  int size = 1;
  while (size < length) size *= 2;
  for (int i = length + static_cast<int>(threadIdx.x); i < size; i += kSelectThreads) {
    best.put(i, minus_infinity<A>(), INT64_MAX);
  }
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kSelectThreads) {
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        if (best.before(high, low) == ((low & run) == 0)) best.swap(low, high);
      }
      __syncthreads();
    }
  }
}

// The best of a text in this chunk and those before: one block a text.
template <typename A>
__global__ void __launch_bounds__(kSelectThreads)
    dense_contrastive_loss_select_best_kernel(Selection<A> c, typename Selection<A>::Side side) {
  OVSEG_DYNAMIC_SHARED(memory);
  const DenseParams<A>& p = c.x.p;
  const int64_t j = blockIdx.x, end = c.first + c.count;
  int* held = reinterpret_cast<int*>(memory);
  Best<A> best = {side.memory.keys + j * side.room, side.memory.indices + j * side.room};
  if (!side.memory.keys) {
    best.indices = reinterpret_cast<int64_t*>(memory + 16);
    best.keys = reinterpret_cast<A*>(best.indices + side.room);
  }
  const Best<A> kept = {side.kept.keys + j * side.capacity, side.kept.indices + j * side.capacity};
  const A lowest = side.positives ? A(0) : c.lowest[j];
  int length = c.first > 0 ? side.lengths[j] : 0;
  for (int i = threadIdx.x; i < length; i += kSelectThreads) best.put(i, kept.keys[i], kept.indices[i]);
  // What comes later has a larger index: it must beat the worst, not equal it.
  A threshold = length == side.capacity ? kept.keys[length - 1] : minus_infinity<A>();
  if (threadIdx.x == 0) *held = length;
  __syncthreads();
  auto shorten = [&] {
    sort(best, length);
    if (length >= side.capacity) length = static_cast<int>(side.capacity), threshold = best.keys[length - 1];
  };
  auto walk = [&](int64_t from, int64_t to) {
    for (; from < to; from += kSelectStep) {
      length = *held;
      __syncthreads();
      if (length + kSelectStep > side.room) {
        shorten();
        if (threadIdx.x == 0) *held = length;
        __syncthreads();
      }
      A keys[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t x = from + k * static_cast<int>(kSelectThreads) + threadIdx.x;
        keys[k] = x < to ? key_of(c, side.positives, j, x, lowest) : minus_infinity<A>();
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        // Where a candidate waits does not matter, only how many there are: the sum is atomic, the result is not left
        // to it.
        const unsigned votes = __ballot_sync(kFullWarp, keys[k] > threshold), lane = threadIdx.x % 32;
        if (votes == 0) continue;
        const int base = __shfl_sync(kFullWarp, lane == 0 ? atomicAdd(held, __popc(votes)) : 0, 0);
        if (keys[k] > threshold) {
          best.put(base + __popc(votes & ((1u << lane) - 1)), keys[k],
                   from + k * static_cast<int>(kSelectThreads) + threadIdx.x);
        }
      }
      __syncthreads();
    }
  };
  // Runs of neighbouring images that are all the text's own, or all others.
  for (int64_t image = c.count > 0 ? c.first / p.N : p.B; image < p.B && image * p.N < end;) {
    const int64_t from = image * p.N < c.first ? c.first : image * p.N;
    const bool taken = own(p, image, j) == side.positives;
    do {
      ++image;
    } while (image < p.B && image * p.N < end && (own(p, image, j) == side.positives) == taken);
    if (taken) walk(from, image * p.N < end ? image * p.N : end);
  }
  length = *held;
  shorten();
  if (!c.last()) {
    for (int i = threadIdx.x; i < length; i += kSelectThreads) kept.put(i, best.keys[i], best.indices[i]);
    if (threadIdx.x == 0) side.lengths[j] = length;
    return;
  }
  const int64_t skip = side.positives ? 0 : p.skip, count = side.positives ? p.k_pos : p.k_neg;
  int64_t* out = (side.positives ? p.positive : p.negative) + j * count;
  for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) {
    out[i] = i + skip < length ? best.indices[i + skip] : -1;
  }
  if (side.positives && threadIdx.x == 0) c.lowest[j] = length > 0 ? best.keys[length - 1] : infinite<A>();
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
Selection<A> layout(const DenseCuda<A>& x, DeviceWorkspace& memory) {
  const DenseParams<A>& p = x.p;
  const bool halves = dense_halves(p);
  const int64_t all = p.B * p.N, row = static_cast<int64_t>(sizeof(A)) * (p.T < 1 ? 1 : p.T) * (halves ? 2 : 1);
  Selection<A> c{};
  c.x = x;
  c.chunk = dense_limit / row / kTile * kTile;
  if (c.chunk < kSelectStep) c.chunk = kSelectStep;
  if (c.chunk > 65535 * kTile) c.chunk = 65535 * kTile;
  if (c.chunk > all) c.chunk = all;
  c.inverse = memory.take<A>(all);
  c.similarity = halves ? nullptr : memory.take<A>(p.T * c.chunk);
  c.lowest = memory.take<A>(p.T);
  for (auto& side : c.side) {
    side.positives = &side == c.side;
    const int64_t wanted = side.positives ? p.k_pos : p.k_neg + p.skip;
    side.capacity = wanted < all ? wanted : all < 1 ? 1 : all;
    for (side.room = kSelectStep; side.room < side.capacity + kSelectStep;) side.room *= 2;
    if (c.several()) {
      side.kept = {memory.take<A>(p.T * side.capacity), memory.take<int64_t>(p.T * side.capacity)};
      side.lengths = memory.take<int32_t>(p.T);
    }
    if (side.shared_bytes() > kMostShared) {
      side.memory = {memory.take<A>(p.T * side.room), memory.take<int64_t>(p.T * side.room)};
    }
  }
  return c;
}

unsigned warps(int64_t count) { return static_cast<unsigned>(ceil_div(count, kThreads / 32)); }

// Chunks of pixels, and of each the positives, the negatives or both.
template <typename K>
const char* sweep(Selection<typename K::A>& c, bool positives, bool negatives) {
  using A = typename K::A;
  const DenseParams<A>& p = c.x.p;
  const int64_t all = p.B * p.N;
  c.own_only = !negatives;
  c.first = 0;
  do {
    c.count = all - c.first < c.chunk ? all - c.first : c.chunk;
    c.read = c.similarity, c.pitch = c.chunk, c.lower = 0;
    if (c.count > 0) {
      if constexpr (K::kHalves) {
        c.read = c.x.product->run(c.first, c.count), c.pitch = c.count, c.lower = p.T * c.count;
      } else {
        const dim3 grid(static_cast<unsigned>(ceil_div(p.T, kTile)), static_cast<unsigned>(ceil_div(c.count, kTile)));
        OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_similarity_kernel<K>, grid, kThreads, kStageBytes,
                               c.x.stream, c));
      }
    }
    for (const auto& side : c.side) {
      if (!(side.positives ? positives : negatives)) continue;
      const size_t shared = side.memory.keys ? 16 : static_cast<size_t>(side.shared_bytes());
      OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_best_kernel<A>, static_cast<unsigned>(p.T), kSelectThreads,
                             shared, c.x.stream, c, side));
    }
    c.first += c.chunk;
  } while (c.first < all);
  return nullptr;
}

template <typename K>
const char* select(const DenseCuda<typename K::A>& x) {
  using A = typename K::A;
  const DenseParams<A>& p = x.p;
  if (p.T == 0) return nullptr;
  DeviceWorkspace memory(x.workspace);
  Selection<A> c = layout(x, memory);
  for (const auto& side : c.side) {
    if (side.capacity > 1 << 28)
      return "more than 2^28 pixels of a text to select; use OVSEG_BACKEND=triton or reference";
  }
  if (p.B * p.N > 0) {
    OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_norms_kernel<K>, warps(p.B * p.N), kThreads, 0, x.stream, c));
  }
  if constexpr (K::kHalves) {
    using T = typename K::T;
    const int64_t count = p.T * p.D;
    if (count > 0) {
      OVSEG_TRY(OVSEG_LAUNCH(dense_contrastive_loss_select_halves_kernel<T>,
                             static_cast<unsigned>(ceil_div(count, static_cast<int64_t>(kThreads))), kThreads, 0,
                             x.stream, p.texts, static_cast<T*>(x.product->halves), count));
    }
  }
  if (p.sampling != Sampling::semi || !c.several()) return sweep<K>(c, true, true);
  // The negatives need the lowest of all positives.
  OVSEG_TRY(sweep<K>(c, true, false));
  return sweep<K>(c, false, true);
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
  DeviceWorkspace counted;
  layout(x, counted);
  return counted.bytes();
}
template <typename A>
size_t dense_backward_workspace(const DenseParams<A>& p) {
  return p.T * p.K * sizeof(A);
}
template size_t dense_select_workspace(const DenseParams<float>&);
template size_t dense_select_workspace(const DenseParams<double>&);
template size_t dense_backward_workspace(const DenseParams<float>&);
template size_t dense_backward_workspace(const DenseParams<double>&);

#define OVSEG_DENSE(name, function)                                                                       \
  template <>                                                                                             \
  const char* name(const DenseCuda<double>& x) {                                                          \
    return function<DenseKind<double>>(x);                                                                \
  }                                                                                                       \
  template <>                                                                                             \
  const char* name(const DenseCuda<float>& x) {                                                           \
    if (x.p.type == Type::float16) return function<DenseKind<half>>(x);                                   \
    return x.p.type == Type::bfloat16 ? function<DenseKind<bfloat16>>(x) : function<DenseKind<float>>(x); \
  }
OVSEG_DENSE(dense_select, select)
OVSEG_DENSE(dense_gather, gather)
OVSEG_DENSE(dense_backward, backward)

}  // namespace ovseg
