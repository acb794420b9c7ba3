// The classes that can win somewhere in the pixels of a block: those whose largest value reaches the best least value.
#pragma once
#include "block.cuh"
#include "types.h"

namespace ovseg {

constexpr unsigned kPruningThreads = 128;

template <typename A>
OVSEG_ANYWHERE size_t candidates_bytes(int64_t classes) {
  return kPruningThreads / 32 * sizeof(A) + (kPruningThreads + 1 + classes) * sizeof(int32_t);
}

template <typename A>
struct Candidates {
  const int32_t* list;  // by rising class, in shared memory
  int32_t count;        // at least 1: where all comparisons fail, class 0 is one
};

// A block of kPruningThreads calls this with bounds(class, least, most); `memory` has candidates_bytes(classes).
template <typename A, typename Bounds>
__device__ Candidates<A> find_candidates(int64_t classes, unsigned char* memory, const Bounds& bounds) {
  A* floors = reinterpret_cast<A*>(memory);                                     // of each warp
  int32_t* counts = reinterpret_cast<int32_t*>(floors + kPruningThreads / 32);  // [kPruningThreads + 1]
  int32_t* list = counts + kPruningThreads + 1;                                 // [classes]
  // Each thread takes neighbouring classes, so that the list comes out by rising class.
  const int64_t each = ceil_div(classes, kPruningThreads), first = threadIdx.x * each;
  const int64_t last = first + each < classes ? first + each : classes;
  A floor = minus_infinity<A>(), least, most;
  for (int64_t c = first; c < last; ++c) {
    bounds(c, least, most);
    floor = larger(least, floor);
  }
  floor = block_max<kPruningThreads>(floor, floors);
  // A little below: rounding must not cut a winner off.
  const A epsilon = sizeof(A) == 4 ? A(1.2e-7) : A(2.3e-16);
  floor -= 16 * epsilon * (A(1) + fabs(floor));
  auto possible = [&](int64_t c) {
    bounds(c, least, most);
    return !(most < floor);
  };
  int32_t mine = 0;
  for (int64_t c = first; c < last; ++c) mine += possible(c) ? 1 : 0;
  counts[threadIdx.x + 1] = mine;
  if (threadIdx.x == 0) counts[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned t = 0; t < kPruningThreads; ++t) counts[t + 1] += counts[t];
  }
  __syncthreads();
  int32_t at = counts[threadIdx.x];
  for (int64_t c = first; c < last; ++c) {
    if (possible(c)) list[at++] = static_cast<int32_t>(c);
  }
  // NaN alone, or pixels that no window covers, have bounds that no class satisfies. A winner is a class nevertheless.
  if (threadIdx.x == 0 && counts[kPruningThreads] == 0) list[0] = 0, counts[kPruningThreads] = 1;
  __syncthreads();
  return {list, counts[kPruningThreads]};
}

}  // namespace ovseg
