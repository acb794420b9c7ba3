// contrastive_loss on CUDA, sm_80 and newer. Forward: a block owns 64 rows and walks the columns, once with images on
// the rows and once with texts; logits live in shared memory. Backward: d logits of a chunk of images, then two
// products. Every output element has one owner and every sum a fixed order. Equation numbers:
// ovseg_kernels/ops/contrastive_loss.py.
#include "../common/block.cuh"
#include "../common/device_workspace.h"
#include "../common/info_nce.cuh"
#include "../common/row_statistics.cuh"
#include "../common/tile.cuh"
#include "contrastive_loss_cuda.h"

namespace ovseg {
namespace {

// Statistics of one row. In the sigmoid loss `sum` is the row's loss.
template <typename A>
using Part = RowStatistics<A>;

template <typename A>
__device__ void add(Part<A>& part, A z, A weight, bool sigmoid) {
  if (!sigmoid) {
    part.add(z, false);
    if (weight != A(0)) part.hits += weight * z, part.positives += weight;
    return;
  }
  const bool whole = weight >= A(1);  // (4); softplus(-z) where it is, which cancels nothing
  const A loss = softplus(whole ? -z : z);
  part.sum += whole || weight == A(0) ? loss : loss - weight * z;
}

template <typename A>
__device__ void merge(Part<A>& part, const Part<A>& other, bool sigmoid) {
  if (!sigmoid) return part.merge(other);
  part.sum += other.sum;
}

// p_ij of one side's rows: equal ids, the diagonal, or a list.
template <typename A>
struct Positives {
  const int64_t *own, *other;  // ids, or null; own is the list of these rows where there is one
  bool listed;
  const A* weights;  // [pairs] in the order of that list
  int64_t rows, pairs, offset;

  __device__ __host__ static Positives of_images(const ContrastiveParams<A>& p) {
    return {p.image_ids, p.text_ids, p.listed, p.pair_weights, p.B, p.pairs, p.offset};
  }
  __device__ __host__ static Positives of_texts(const ContrastiveParams<A>& p) {
    return {p.text_ids, p.image_ids, p.listed, p.listed ? p.pair_weights + p.pairs : nullptr, p.T, p.pairs, -p.offset};
  }
};

// p of one row, from one column on, as its columns rise. Pairs listed twice are added in their order. Stays inside the
// list whatever its starts hold.
template <typename A>
struct Row {
  const Positives<A>& x;
  int64_t i, next, end;

  __device__ Row(const Positives<A>& x, int64_t i, int64_t column) : x(x), i(i), next(0), end(0) {
    if (!x.listed) return;
    const int64_t begin = x.own[i], last = x.own[i + 1];
    end = last > x.pairs ? x.pairs : last;
    next = first_at_least(x.own + x.rows + 1, begin < 0 ? 0 : begin, end, column);
  }
  __device__ A at(int64_t j) {
    if (!x.listed) return (x.own ? x.own[i] == x.other[j] : j == i + x.offset) ? A(1) : A(0);
    A sum = 0;
    for (; next < end && x.own[x.rows + 1 + next] == j; ++next) sum += x.weights[next];
    return sum;
  }
};

// One side: own features on the rows, those of the other side on the columns.
template <typename A>
struct Side {
  const A *own, *other;
  Positives<A> positives;
  int64_t rows, columns, D, splits;
  bool sigmoid;
  const A *scale, *bias;
  Part<A>* parts;  // [splits, rows]
  A* out;          // [3, rows]
};

template <typename P>
__global__ void __launch_bounds__(kThreads) contrastive_loss_fwd_stats_kernel(Side<typename P::Sum> x) {
  using A = typename P::Sum;
  OVSEG_DYNAMIC_SHARED(memory);
  A* tile = reinterpret_cast<A*>(memory + kStageBytes);
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * kTile, i = r0 + threadIdx.x;
  const int64_t tiles = ceil_div(x.columns, kTile), each = ceil_div(tiles, x.splits);
  const int64_t begin = blockIdx.y * each, end = begin + each < tiles ? begin + each : tiles;
  const Operand<A, A> rows = {x.own, x.D, 1, x.rows, x.D}, columns = {x.other, x.D, 1, x.columns, x.D};
  const A scale = *x.scale, bias = *x.bias;
  Part<A> part;
  part.clear();
  for (int64_t t = begin; t < end; ++t) {
    A acc[kAccumulators];
    clear<P>(acc);
    product<P>(rows, r0, columns, t * kTile, memory, acc);
    store_tile<P>(acc, tile);
    __syncthreads();
    if (threadIdx.x < kTile && i < x.rows) {
      Row<A> row(x.positives, i, t * kTile);  // sought for every tile: registers are short during the product
      for (int c = 0; c < kTile && t * kTile + c < x.columns; ++c) {
        add(part, scale * tile[threadIdx.x * kTilePitch + c] + bias, row.at(t * kTile + c), x.sigmoid);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < kTile && i < x.rows) x.parts[blockIdx.y * x.rows + i] = part;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) contrastive_loss_fwd_finish_kernel(Side<A> x) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= x.rows) return;
  Part<A> all = x.parts[i];
  for (int64_t split = 1; split < x.splits; ++split) merge(all, x.parts[split * x.rows + i], x.sigmoid);
  x.out[i] = x.sigmoid ? all.sum : all.log_sum_exp();
  x.out[x.rows + i] = all.hits;
  x.out[2 * x.rows + i] = x.sigmoid ? A(1) : all.positives;
}

// A chunk of images in the backward.
template <typename A>
struct Chunk {
  ContrastiveCuda<A> x;
  int64_t first, count;
  double* sums;     // [2] of d scale and d bias, of all chunks so far
  double* partial;  // [blocks, 2]
  A* d_logits;      // [count, T], with the scale
  size_t bytes;     // of all of these
};

// One side of (5).
template <typename A>
__device__ A side_gradient(const InfoNceSide<A>& side, A z, A weight) {
  const A attracted = side.gradient(z, false);
  if (weight == A(0) || side.weight == A(0)) return attracted;
  return attracted - weight * (side.weight / *side.positives);
}

// (5) or (6) of one pair.
template <typename A>
__device__ A d_logit(const ContrastiveCuda<A>& x, int64_t i, int64_t j, A z, A grad) {
  const ContrastiveParams<A>& p = x.p;
  const Positives<A> positives = Positives<A>::of_images(p);
  const A weight = Row<A>(positives, i, j).at(j);
  if (p.sigmoid) {
    const A e = exp(z > A(0) ? -z : z);
    return grad * p.row_weight[i] * ((z > A(0) ? A(1) : e) / (A(1) + e) - (weight > A(1) ? A(1) : weight));
  }
  const auto row = InfoNceSide<A>::of(p.row_weight, p.rows, i, p.B);
  const auto column = InfoNceSide<A>::of(p.column_weight, p.columns, j, p.T);
  return grad * (side_gradient(row, z, weight) + side_gradient(column, z, weight));
}

template <typename P>
__global__ void __launch_bounds__(kThreads) contrastive_loss_bwd_logits_kernel(Chunk<typename P::Sum> c) {
  using A = typename P::Sum;
  OVSEG_DYNAMIC_SHARED(memory);
  const ContrastiveParams<A>& p = c.x.p;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) * kTile, i0 = c.first + static_cast<int64_t>(blockIdx.y) * kTile;
  const Operand<A, A> images = {p.image, p.D, 1, c.first + c.count, p.D}, texts = {p.text, p.D, 1, p.T, p.D};
  const A scale = *c.x.scale, bias = *c.x.bias, grad = *c.x.grad;
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(images, i0, texts, j0, memory, acc);
  double sums[2] = {0, 0};  // of d scale and d bias
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t i = i0 + tile_row<P>(k), j = j0 + tile_column<P>(k);
    if (i >= c.first + c.count || j >= p.T) continue;
    const A dz = d_logit(c.x, i, j, scale * acc[k] + bias, grad);
    c.d_logits[(i - c.first) * p.T + j] = scale * dz;
    sums[0] += static_cast<double>(dz) * static_cast<double>(acc[k]), sums[1] += static_cast<double>(dz);
  }
  block_sum<kThreads>(sums, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    c.partial[2 * block] = sums[0], c.partial[2 * block + 1] = sums[1];
  }
}

// The chunk's partial sums onto the running ones, and these to the outputs.
template <typename A>
__global__ void __launch_bounds__(kThreads) contrastive_loss_bwd_scalars_kernel(Chunk<A> c, int64_t blocks) {
  OVSEG_DYNAMIC_SHARED(memory);
  double sums[2] = {0, 0};
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sums[0] += c.partial[2 * b], sums[1] += c.partial[2 * b + 1];
  block_sum<kThreads>(sums, reinterpret_cast<double*>(memory));
  if (threadIdx.x > 0) return;
  for (int k = 0; k < 2; ++k) c.sums[k] = sums[k] += c.first > 0 ? c.sums[k] : 0;
  *c.x.grad_scale = static_cast<A>(sums[0]), *c.x.grad_bias = static_cast<A>(sums[1]);
}

// acc to out [rows, D], added to what is there or not.
template <typename P>
__device__ void store_gradient(const typename P::Sum (&acc)[kAccumulators], typename P::Sum* out, int64_t r0,
                               int64_t d0, int64_t rows, int64_t D, bool add) {
#pragma unroll
  for (int k = 0; k < kAccumulators; ++k) {
    const int64_t r = r0 + tile_row<P>(k), d = d0 + tile_column<P>(k);
    if (r < rows && d < D) out[r * D + d] = add ? out[r * D + d] + acc[k] : acc[k];
  }
}

// d image = d logits text, (7).
template <typename P>
__global__ void __launch_bounds__(kThreads) contrastive_loss_bwd_image_kernel(Chunk<typename P::Sum> c) {
  using A = typename P::Sum;
  OVSEG_DYNAMIC_SHARED(memory);
  const ContrastiveParams<A>& p = c.x.p;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const Operand<A, A> dz = {c.d_logits, p.T, 1, c.count, p.T}, texts = {p.text, 1, p.D, p.D, p.T};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(dz, r0, texts, d0, memory, acc);
  store_gradient<P>(acc, p.grad_image + c.first * p.D, r0, d0, c.count, p.D, false);
}

// d text += d logits^T image of the chunk, (7).
template <typename P>
__global__ void __launch_bounds__(kThreads) contrastive_loss_bwd_text_kernel(Chunk<typename P::Sum> c) {
  using A = typename P::Sum;
  OVSEG_DYNAMIC_SHARED(memory);
  const ContrastiveParams<A>& p = c.x.p;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * kTile, d0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const Operand<A, A> dz = {c.d_logits, 1, p.T, p.T, c.count};
  const Operand<A, A> images = {p.image + c.first * p.D, 1, p.D, p.D, c.count};
  A acc[kAccumulators];
  clear<P>(acc);
  product<P>(dz, r0, images, d0, memory, acc);
  store_gradient<P>(acc, p.grad_text, r0, d0, p.T, p.D, c.first > 0);
}

unsigned tiles(int64_t n) { return static_cast<unsigned>(ceil_div(n, kTile)); }

// Enough blocks for a large GPU where the rows alone do not give them.
int64_t splits(int64_t rows, int64_t columns) {
  if (rows == 0) return 1;
  const int64_t wanted = ceil_div(256, ceil_div(rows, kTile)), most = ceil_div(columns, kTile);
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

template <typename A>
int64_t chunk_rows(const ContrastiveParams<A>& p) {
  const int64_t rows = contrastive_limit / (p.T * static_cast<int64_t>(sizeof(A)) + 1) / kTile * kTile;
  const int64_t fits = rows < kTile ? kTile : rows > 65535 * kTile ? 65535 * kTile : rows;
  return fits < p.B ? fits : p.B;
}

// Statistics of the shares of columns, for the side that has more of them.
template <typename A>
Part<A>* shares(const ContrastiveParams<A>& p, DeviceWorkspace& memory) {
  const int64_t images = splits(p.B, p.T) * p.B, texts = splits(p.T, p.B) * p.T;
  return memory.take<Part<A>>(images > texts ? images : texts);
}

template <typename A>
Chunk<A> first_chunk(const ContrastiveCuda<A>& x, DeviceWorkspace memory) {
  const int64_t rows = chunk_rows(x.p), blocks = static_cast<int64_t>(tiles(rows)) * tiles(x.p.T);
  Chunk<A> c{};
  c.x = x, c.count = rows;
  c.sums = memory.take<double>(2);
  c.partial = memory.take<double>(2 * blocks);
  c.d_logits = memory.take<A>(rows * x.p.T);
  c.bytes = memory.bytes();
  return c;
}

template <typename P>
const char* one_side(const ContrastiveCuda<typename P::Sum>& x, bool of_texts) {
  using A = typename P::Sum;
  const ContrastiveParams<A>& p = x.p;
  DeviceWorkspace memory(x.workspace);
  Side<A> side = {p.image, p.text, Positives<A>::of_images(p), p.B,   p.T, p.D, 0, p.sigmoid,
                  x.scale, x.bias, shares(p, memory),          p.rows};
  if (of_texts) {
    side.own = p.text, side.other = p.image, side.rows = p.T, side.columns = p.B, side.out = p.columns;
    side.positives = Positives<A>::of_texts(p);
  }
  if (side.rows == 0) return nullptr;
  side.splits = splits(side.rows, side.columns);
  const dim3 grid(tiles(side.rows), static_cast<unsigned>(side.splits));
  const size_t shared = kStageBytes + kTile * kTilePitch * sizeof(A);
  OVSEG_TRY(OVSEG_LAUNCH(contrastive_loss_fwd_stats_kernel<P>, grid, kThreads, shared, x.stream, side));
  const unsigned blocks = static_cast<unsigned>(ceil_div(side.rows, kThreads));
  return OVSEG_LAUNCH(contrastive_loss_fwd_finish_kernel<A>, blocks, kThreads, 0, x.stream, side);
}

template <typename P>
const char* statistics(const ContrastiveCuda<typename P::Sum>& x) {
  OVSEG_TRY(one_side<P>(x, false));
  return x.p.sigmoid ? nullptr : one_side<P>(x, true);
}

template <typename P>
const char* gradient(const ContrastiveCuda<typename P::Sum>& x) {
  using A = typename P::Sum;
  const ContrastiveParams<A>& p = x.p;
  Chunk<A> c = first_chunk(x, DeviceWorkspace(x.workspace));
  const int64_t rows = c.count;
  for (c.first = 0; c.first < p.B; c.first += rows) {
    c.count = p.B - c.first < rows ? p.B - c.first : rows;
    const dim3 pairs(tiles(p.T), tiles(c.count));
    OVSEG_TRY(OVSEG_LAUNCH(contrastive_loss_bwd_logits_kernel<P>, pairs, kThreads, kStageBytes, x.stream, c));
    const int64_t blocks = static_cast<int64_t>(pairs.x) * pairs.y;
    OVSEG_TRY(OVSEG_LAUNCH(contrastive_loss_bwd_scalars_kernel<A>, 1, kThreads, 64, x.stream, c, blocks));
    if (p.grad_image) {
      const dim3 grid(tiles(c.count), tiles(p.D));
      OVSEG_TRY(OVSEG_LAUNCH(contrastive_loss_bwd_image_kernel<P>, grid, kThreads, kStageBytes, x.stream, c));
    }
    if (p.grad_text) {
      const dim3 grid(tiles(p.T), tiles(p.D));
      OVSEG_TRY(OVSEG_LAUNCH(contrastive_loss_bwd_text_kernel<P>, grid, kThreads, kStageBytes, x.stream, c));
    }
  }
  return nullptr;
}

}  // namespace

template <typename A>
size_t contrastive_workspace(const ContrastiveParams<A>& p, bool backward) {
  DeviceWorkspace counted;
  if (!backward) {
    shares(p, counted);
    return counted.bytes();
  }
  ContrastiveCuda<A> x{};
  x.p = p;
  return first_chunk(x, counted).bytes;
}

template size_t contrastive_workspace(const ContrastiveParams<float>&, bool);
template size_t contrastive_workspace(const ContrastiveParams<double>&, bool);
template <>
const char* contrastive_statistics(const ContrastiveCuda<float>& x) {
  return x.tf32 ? statistics<Tf32>(x) : statistics<Exact<float>>(x);
}
template <>
const char* contrastive_statistics(const ContrastiveCuda<double>& x) {
  return statistics<Exact<double>>(x);
}
template <>
const char* contrastive_gradient(const ContrastiveCuda<float>& x) {
  return x.tf32 ? gradient<Tf32>(x) : gradient<Exact<float>>(x);
}
template <>
const char* contrastive_gradient(const ContrastiveCuda<double>& x) {
  return gradient<Exact<double>>(x);
}

}  // namespace ovseg
