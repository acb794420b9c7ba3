// What the threads of one block add up together, in an order that depends on nothing but their number. All of them must
// call, with the same shared memory; it is free for other uses again when a function returns.
#pragma once
#include "device.cuh"

namespace ovseg {

// Every thread gets combine(.. combine(combine(w_0, w_1), w_2) ..) of the warps' values, after `within` made one value
// of each warp. `shared`: one T a warp.
template <unsigned threads, typename T, typename Within, typename Combine>
__device__ inline T block_combine(T mine, T* shared, const Within& within, const Combine& combine) {
  static_assert(threads % 32 == 0, "whole warps");
  mine = within(mine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  T all = shared[0];
  for (unsigned warp = 1; warp < threads / 32; ++warp) all = combine(all, shared[warp]);
  __syncthreads();
  return all;
}

// Sum over the block, in every thread. `shared`: threads / 32 elements.
template <unsigned threads, typename A>
__device__ inline A block_sum(A mine, A* shared) {
  return block_combine<threads>(mine, shared, [](A x) { return warp_sum(x); }, [](A x, A y) { return x + y; });
}

// The largest value of the block, in every thread; a NaN is kept. `shared`: threads / 32 elements.
template <unsigned threads, typename A>
__device__ inline A block_max(A mine, A* shared) {
  return block_combine<threads>(mine, shared, [](A x) { return warp_max(x); }, [](A x, A y) { return larger(y, x); });
}

// K sums at the price of one, in every thread. `shared`: K * threads / 32 elements.
template <unsigned threads, typename A, int K>
__device__ inline void block_sum(A (&mine)[K], A* shared) {
  static_assert(threads % 32 == 0, "whole warps");
#pragma unroll
  for (int k = 0; k < K; ++k) {
    mine[k] = warp_sum(mine[k]);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * K + k] = mine[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    mine[k] = shared[k];
    for (unsigned warp = 1; warp < threads / 32; ++warp) mine[k] += shared[warp * K + k];
  }
  __syncthreads();
}

// Structures with merge(other), such as RowStatistics: the threads with the same threadIdx.x % apart become one, by a
// tree, and each of them gets the result. `shared`: one T a thread.
template <unsigned threads, unsigned apart = 1, typename T>
__device__ inline T block_merge(const T& mine, T* shared) {
  static_assert((threads & (threads - 1)) == 0 && (apart & (apart - 1)) == 0, "powers of two");
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = threads / 2; half >= apart; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x].merge(shared[threadIdx.x + half]);
    __syncthreads();
  }
  const T all = shared[threadIdx.x % apart];
  __syncthreads();
  return all;
}

}  // namespace ovseg
