// patch_entropy: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/patch_entropy.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

// A is the type of the scores and of all sums: float or double. Everything is contiguous.
template <typename A>
struct PatchEntropyParams {
  int64_t B, N;
  const A* scores;  // [B, N]
  A* entropy;       // [B]

  // Backward only.
  const A* grad;   // [B]
  A* grad_scores;  // [B, N]
};

// One table per instruction set: images [begin, end).
template <typename A>
struct PatchEntropyTable {
  void (*forward)(const PatchEntropyParams<A>&, int64_t begin, int64_t end);
  void (*backward)(const PatchEntropyParams<A>&, int64_t begin, int64_t end);
};

OVSEG_PER_ISA(template <typename A> const PatchEntropyTable<A>& patch_entropy_table();)

}  // namespace ovseg
