// similarity_contrastive_loss on CUDA: memory-bound sweeps over the matrix. Every sum has a fixed order.
// Equation numbers: ovseg_kernels/ops/similarity_contrastive_loss.py.
#include "../common/block.cuh"
#include "../common/info_nce.cuh"
#include "../common/row_statistics.cuh"
#include "similarity_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

constexpr unsigned kSweepThreads = 256;
constexpr unsigned kColumns = 32;  // of one block of the column sweep; its 8 rows of threads share them

template <typename A>
using Part = RowStatistics<A>;

template <typename A>
__device__ void store(const Part<A>& part, A* out, int64_t index, int64_t stride) {
  out[index] = part.log_sum_exp();
  out[index + stride] = part.hits;
  out[index + 2 * stride] = part.positives;
}

template <typename A>
__device__ inline void add(Part<A>& part, const SimilarityLossParams<A>& p, A scale, int64_t i, int64_t j) {
  if (!p.kept(i, j)) return;
  part.add_weighted(scale * p.similarity[i * p.strides[0] + j * p.strides[1]], p.weight(i, j));
}

// One block a row of images.
template <typename A>
__global__ void __launch_bounds__(kSweepThreads) similarity_contrastive_loss_rows_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t i = blockIdx.x;
  Part<A> mine;
  mine.clear();
  for (int64_t j = threadIdx.x; j < x.p.T; j += kSweepThreads) add(mine, x.p, *x.scale, i, j);
  mine = block_merge<kSweepThreads>(mine, reinterpret_cast<Part<A>*>(memory));
  if (threadIdx.x == 0) store(mine, x.p.rows, i, x.p.B);
}

template <typename A>
__global__ void __launch_bounds__(kSweepThreads) similarity_contrastive_loss_columns_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  const unsigned column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Part<A> mine;
  mine.clear();
  for (int64_t i = group; j < x.p.T && i < x.p.B; i += kSweepThreads / kColumns) add(mine, x.p, *x.scale, i, j);
  mine = block_merge<kSweepThreads, kColumns>(mine, reinterpret_cast<Part<A>*>(memory));
  if (group == 0 && j < x.p.T) store(mine, x.p.columns, j, x.p.T);
}

// Equation (4) of one row: d similarity = scale dz, and the row's share of d scale = sum dz similarity.
template <typename A>
__global__ void __launch_bounds__(kSweepThreads) similarity_contrastive_loss_bwd_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  const SimilarityLossParams<A>& p = x.p;
  const int64_t i = blockIdx.x;
  const A scale = *x.scale, grad = *x.grad;
  const auto row = InfoNceSide<A>::of(p.row_weight, p.rows, i, p.B);
  double d_scale = 0;
  for (int64_t j = threadIdx.x; j < p.T; j += kSweepThreads) {
    A out = 0;
    if (p.kept(i, j)) {
      const A phi = p.similarity[i * p.strides[0] + j * p.strides[1]], z = scale * phi;
      const auto column = InfoNceSide<A>::of(p.column_weight, p.columns, j, p.T);
      A dz = row.of_softmax(z) + column.of_softmax(z);
      const A positive = p.weight(i, j);
      if (positive != A(0)) dz -= row.of_target(positive) + column.of_target(positive);
      dz *= grad;
      out = scale * dz;
      d_scale += static_cast<double>(dz) * static_cast<double>(phi);
    }
    p.grad_similarity[i * p.T + j] = out;
  }
  d_scale = block_sum<kSweepThreads>(d_scale, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) p.row_scale[i] = d_scale;
}

template <typename A>
__global__ void __launch_bounds__(kSweepThreads) similarity_contrastive_loss_bwd_scale_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < x.p.B; i += kSweepThreads) sum += x.p.row_scale[i];
  sum = block_sum<kSweepThreads>(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) *x.grad_scale = static_cast<A>(sum);
}

}  // namespace

template <typename A>
const char* similarity_loss_stats(const SimilarityLossCuda<A>& x) {
  const size_t shared = kSweepThreads * sizeof(Part<A>);
  if (x.p.B > 0) {
    const unsigned blocks = static_cast<unsigned>(x.p.B);
    OVSEG_TRY(OVSEG_LAUNCH(similarity_contrastive_loss_rows_kernel<A>, blocks, kSweepThreads, shared, x.stream, x));
  }
  if (x.p.T == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(ceil_div(x.p.T, kColumns));
  return OVSEG_LAUNCH(similarity_contrastive_loss_columns_kernel<A>, blocks, kSweepThreads, shared, x.stream, x);
}

template <typename A>
const char* similarity_loss_gradient(const SimilarityLossCuda<A>& x) {
  const size_t shared = kSweepThreads / 32 * sizeof(double);
  if (x.p.B > 0) {
    const unsigned blocks = static_cast<unsigned>(x.p.B);
    OVSEG_TRY(OVSEG_LAUNCH(similarity_contrastive_loss_bwd_kernel<A>, blocks, kSweepThreads, shared, x.stream, x));
  }
  return OVSEG_LAUNCH(similarity_contrastive_loss_bwd_scale_kernel<A>, 1, kSweepThreads, shared, x.stream, x);
}

template const char* similarity_loss_stats<float>(const SimilarityLossCuda<float>&);
template const char* similarity_loss_stats<double>(const SimilarityLossCuda<double>&);
template const char* similarity_loss_gradient<float>(const SimilarityLossCuda<float>&);
template const char* similarity_loss_gradient<double>(const SimilarityLossCuda<double>&);

}  // namespace ovseg
