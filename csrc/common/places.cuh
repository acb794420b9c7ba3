// Positions of neighbouring outputs between the samples of one axis. They are computed once for a tile, kept in shared
// memory, and looked up for every class and pixel.
#pragma once
#include "device.cuh"
#include "resize.h"

namespace ovseg {

template <typename A>
struct alignas(sizeof(A) == 4 ? 16 : 8) Place {  // of float: one load of 16 bytes
  A to_low, to_high;                             // weights
  int32_t low, high;                             // samples
};

template <typename A>
__device__ inline Place<A> place_of(int64_t at, int64_t samples, int64_t outputs) {
  const Between<A> found = between<A>(at, samples, outputs);
  return {found.to_low, found.to_high, static_cast<int32_t>(found.low), static_cast<int32_t>(found.high)};
}

// table[i] for the outputs first + i; by a block of `threads`, which must meet before it reads them.
template <unsigned threads, typename A>
__device__ inline void fill_places(Place<A>* table, int64_t first, int32_t count, int64_t samples, int64_t outputs) {
  for (int32_t i = threadIdx.x; i < count; i += threads) table[i] = place_of<A>(first + i, samples, outputs);
}

}  // namespace ovseg
