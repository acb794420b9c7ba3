// The classes that can win somewhere in the pixels of a block: those whose largest value reaches the best least value.
#pragma once
#include "block.cuh"
#include "types.h"

namespace ovseg {

constexpr unsigned kPruningThreads = 128;
constexpr int32_t kKeptClasses = 512;  // whose largest values are kept; those of others are computed twice

template <typename A>
OVSEG_ANYWHERE size_t candidates_bytes(int64_t classes) {
  const int64_t warps = kPruningThreads / 32, kept = classes < kKeptClasses ? classes : kKeptClasses;
  return (warps + kept) * sizeof(A) + (2 * warps + classes) * sizeof(int32_t);
}

template <typename A>
struct Candidates {
  const int32_t* list;  // by rising class, in shared memory
  int32_t count;        // at least 1: where all comparisons fail, class 0 is one
};

// A block of kPruningThreads calls this with bounds(class, least, most); `memory` has candidates_bytes(classes).
template <typename A, typename Bounds>
__device__ Candidates<A> find_candidates(int32_t classes, unsigned char* memory, const Bounds& bounds) {
  constexpr int32_t threads = kPruningThreads, warps = threads / 32;
  A* floors = reinterpret_cast<A*>(memory);  // [warps]
  A* kept = floors + warps;
  int32_t* counts = reinterpret_cast<int32_t*>(kept + (classes < kKeptClasses ? classes : kKeptClasses));
  int32_t* list = counts + 2 * warps;  // [classes]
  const int32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  A floor = minus_infinity<A>(), least, most;
  for (int32_t c = thread; c < classes; c += threads) {
    bounds(c, least, most);
    floor = larger(least, floor);
    if (c < kKeptClasses) kept[c] = most;
  }
  floor = block_max<kPruningThreads>(floor, floors);
  // A little below: rounding must not cut a winner off.
  const A epsilon = sizeof(A) == 4 ? A(1.2e-7) : A(2.3e-16);
  floor -= 16 * epsilon * (A(1) + fabs(floor));
  int32_t count = 0;
  for (int32_t first = 0; first < classes; first += threads) {
    const int32_t c = first + thread;
    bool possible = false;
    if (c < classes) {
      if (c < kKeptClasses) {
        most = kept[c];
      } else {
        bounds(c, least, most);
      }
      possible = !(most < floor);
    }
    const unsigned votes = __ballot_sync(kFullWarp, possible);
    int32_t* now = counts + first / threads % 2 * warps;  // whoever is a round ahead writes the other half
    if (lane == 0) now[warp] = __popc(votes);
    __syncthreads();
    int32_t at = count + __popc(votes & ((1u << lane) - 1));
    for (int32_t other = 0; other < warps; ++other) {
      at += other < warp ? now[other] : 0;
      count += now[other];
    }
    if (possible) list[at] = c;
  }
  // NaN alone, or pixels that no window covers, have bounds that no class satisfies. A winner is a class nevertheless.
  if (thread == 0 && count == 0) list[0] = 0;
  __syncthreads();
  return {list, count > 0 ? count : 1};
}

}  // namespace ovseg
