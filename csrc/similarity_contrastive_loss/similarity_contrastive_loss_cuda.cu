// similarity_contrastive_loss on CUDA: memory-bound sweeps over the matrix. Every sum has a fixed order.
// Equation numbers: ovseg_kernels/ops/similarity_contrastive_loss.py.
#include "../common/row_statistics.cuh"
#include "similarity_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

constexpr unsigned kThreads = 256;
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
  if (p.pair_mask && !p.pair_mask[i * p.T + j]) return;
  const bool positive = p.image_ids ? p.image_ids[i] == p.text_ids[j] : j == i + p.offset;
  part.add(scale * p.similarity[i * p.strides[0] + j * p.strides[1]], positive);
}

// One block a row of images.
template <typename A>
__global__ void __launch_bounds__(kThreads) similarity_contrastive_loss_rows_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  Part<A>* parts = reinterpret_cast<Part<A>*>(memory);
  const int64_t i = blockIdx.x;
  Part<A> mine;
  mine.clear();
  for (int64_t j = threadIdx.x; j < x.p.T; j += kThreads) add(mine, x.p, *x.scale, i, j);
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x].merge(parts[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) store(parts[0], x.p.rows, i, x.p.B);
}

template <typename A>
__global__ void __launch_bounds__(kThreads) similarity_contrastive_loss_columns_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  Part<A>* parts = reinterpret_cast<Part<A>*>(memory);
  const unsigned column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Part<A> mine;
  mine.clear();
  for (int64_t i = group; j < x.p.T && i < x.p.B; i += kThreads / kColumns) add(mine, x.p, *x.scale, i, j);
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = kThreads / kColumns / 2; half > 0; half /= 2) {
    if (group < half) parts[threadIdx.x].merge(parts[threadIdx.x + half * kColumns]);
    __syncthreads();
  }
  if (group == 0 && j < x.p.T) store(parts[column], x.p.columns, j, x.p.T);
}

// Equation (4) of one row: d similarity = scale dz, and the row's share of d scale = sum dz similarity.
template <typename A>
__global__ void __launch_bounds__(kThreads) similarity_contrastive_loss_bwd_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  const SimilarityLossParams<A>& p = x.p;
  const int64_t i = blockIdx.x;
  const A scale = *x.scale, grad = *x.grad, row_weight = p.row_weight[i], row_lse = p.rows[i];
  const A row_share = row_weight / p.rows[2 * p.B + i];
  double d_scale = 0;
  for (int64_t j = threadIdx.x; j < p.T; j += kThreads) {
    A out = 0;
    if (!p.pair_mask || p.pair_mask[i * p.T + j]) {
      const A phi = p.similarity[i * p.strides[0] + j * p.strides[1]], z = scale * phi;
      const A column_weight = p.column_weight[j];
      A dz = 0;  // a row or column of weight 0 has no positive and may have no finite log-sum-exp
      if (row_weight != A(0)) dz += row_weight * exp(z - row_lse);
      if (column_weight != A(0)) dz += column_weight * exp(z - p.columns[j]);
      if (p.image_ids ? p.image_ids[i] == p.text_ids[j] : j == i + p.offset) {
        dz -= row_share + column_weight / p.columns[2 * p.T + j];
      }
      dz *= grad;
      out = scale * dz;
      d_scale += static_cast<double>(dz) * static_cast<double>(phi);
    }
    p.grad_similarity[i * p.T + j] = out;
  }
  sums[threadIdx.x] = d_scale;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) p.row_scale[i] = sums[0];
}

template <typename A>
__global__ void __launch_bounds__(kThreads) similarity_contrastive_loss_bwd_scale_kernel(SimilarityLossCuda<A> x) {
  OVSEG_DYNAMIC_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < x.p.B; i += kThreads) sum += x.p.row_scale[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *x.grad_scale = static_cast<A>(sums[0]);
}

}  // namespace

template <typename A>
const char* similarity_loss_stats(const SimilarityLossCuda<A>& x) {
  const size_t shared = kThreads * sizeof(Part<A>);
  if (x.p.B > 0) {
    const unsigned blocks = static_cast<unsigned>(x.p.B);
    OVSEG_TRY(OVSEG_LAUNCH(similarity_contrastive_loss_rows_kernel<A>, blocks, kThreads, shared, x.stream, x));
  }
  if (x.p.T == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(ceil_div(x.p.T, kColumns));
  return OVSEG_LAUNCH(similarity_contrastive_loss_columns_kernel<A>, blocks, kThreads, shared, x.stream, x);
}

template <typename A>
const char* similarity_loss_gradient(const SimilarityLossCuda<A>& x) {
  const size_t shared = kThreads * sizeof(double);
  if (x.p.B > 0) {
    const unsigned blocks = static_cast<unsigned>(x.p.B);
    OVSEG_TRY(OVSEG_LAUNCH(similarity_contrastive_loss_bwd_kernel<A>, blocks, kThreads, shared, x.stream, x));
  }
  return OVSEG_LAUNCH(similarity_contrastive_loss_bwd_scale_kernel<A>, 1, kThreads, shared, x.stream, x);
}

template const char* similarity_loss_stats<float>(const SimilarityLossCuda<float>&);
template const char* similarity_loss_stats<double>(const SimilarityLossCuda<double>&);
template const char* similarity_loss_gradient<float>(const SimilarityLossCuda<float>&);
template const char* similarity_loss_gradient<double>(const SimilarityLossCuda<double>&);

}  // namespace ovseg
