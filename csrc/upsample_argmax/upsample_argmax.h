// upsample_argmax: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/upsample_argmax.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

enum class LabelType : int { int64 = 0, int16 = 1, uint8 = 2 };

// A is the type of all arithmetic: double for float64 logits, float for all others. Everything is contiguous.
template <typename A>
struct UpsampleParams {
  int64_t B, C, h, w, H, W;
  const A* logits;        // [B, C, h, w]
  const A* bias;          // [C] or null
  const int64_t* labels;  // [C], of every class, or null: its index
  bool has_threshold;
  A threshold;
  int64_t background;
  LabelType type;
  void* out;  // [B, H, W]
  A* value;   // [B, H, W] or null
};

template <typename A>
OVSEG_ANYWHERE int64_t label_of(const UpsampleParams<A>& p, int64_t c, A best) {
  if (p.has_threshold && best < p.threshold) return p.background;
  return p.labels ? p.labels[c] : c;
}

// Where an output row or column lies between two samples, (1).
template <typename A>
struct Between {
  int64_t low, high;
  A to_low, to_high;  // weights
};

template <typename A>
OVSEG_ANYWHERE Between<A> between(int64_t at, int64_t samples, int64_t outputs) {
  const A scale = static_cast<A>(samples) / static_cast<A>(outputs);
  A source = (static_cast<A>(at) + A(0.5)) * scale - A(0.5);
  source = source < A(0) ? A(0) : source;
  int64_t low = static_cast<int64_t>(source);
  low = low > samples - 1 ? samples - 1 : low;
  const int64_t high = low + (low < samples - 1 ? 1 : 0);
  const A part = source - static_cast<A>(low);
  return {low, high, A(1) - part, part};
}

// One table per instruction set: rows of samples [begin, end) of B h, with the output rows between them.
template <typename A>
struct UpsampleTable {
  int64_t (*workspace_size)(const UpsampleParams<A>&);  // elements of A for one thread
  void (*rows)(const UpsampleParams<A>&, int64_t begin, int64_t end, A* workspace);
};

OVSEG_PER_ISA(template <typename A> const UpsampleTable<A>& upsample_table();)

}  // namespace ovseg
