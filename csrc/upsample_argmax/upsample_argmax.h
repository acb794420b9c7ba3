// upsample_argmax: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/upsample_argmax.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/resize.h"

namespace ovseg {

// A is the type of all arithmetic: double for float64 logits, float for all others. Everything is contiguous.
template <typename A>
struct UpsampleParams : LabelRule<A> {
  int64_t B, C, h, w;
  const A* logits;  // [B, C, h, w]
};

// One table per instruction set: rows of samples [begin, end) of B h, with the output rows between them.
template <typename A>
struct UpsampleTable {
  int64_t (*workspace_size)(const UpsampleParams<A>&);  // elements of A for one thread
  void (*rows)(const UpsampleParams<A>&, int64_t begin, int64_t end, A* workspace);
};

OVSEG_PER_ISA(template <typename A> const UpsampleTable<A>& upsample_table();)

}  // namespace ovseg
