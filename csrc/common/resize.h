// Bilinear resizing (align_corners False) and what becomes of the winning class. No torch and no device code here.
#pragma once
#include "types.h"

namespace ovseg {

enum class LabelType : int { int64 = 0, int16 = 1, uint8 = 2 };

// From the winning class and its value to a label.
template <typename A>
struct LabelRule {
  int64_t H, W;           // of one label map
  const A* bias;          // [C] or null
  const int64_t* labels;  // [C], of every class, or null: its index
  bool has_threshold;
  A threshold;
  int64_t background;
  LabelType type;
  void* out;      // [B, H, W]
  A* value;       // [B, H, W] or null
  int32_t* flag;  // becomes 1 where numbers are found that are refused, or null: nobody asks
};

template <typename A>
OVSEG_ANYWHERE void put_label(const LabelRule<A>& p, int64_t at, int64_t c, A best) {
  const int64_t label = p.has_threshold && best < p.threshold ? p.background : p.labels ? p.labels[c] : c;
  if (p.type == LabelType::int64) static_cast<int64_t*>(p.out)[at] = label;
  if (p.type == LabelType::int16) static_cast<int16_t*>(p.out)[at] = static_cast<int16_t>(label);
  if (p.type == LabelType::uint8) static_cast<uint8_t*>(p.out)[at] = static_cast<uint8_t>(label);
  if (p.value) p.value[at] = best;
}

// Where an output row or column lies between two samples.
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
  A part = source - static_cast<A>(low);
  if (part < A(1e-3) || part > A(0.999)) {
    // Rounding must not give a sample a weight that has none: it may be infinite.
    const int64_t twice = (2 * at + 1) * samples - outputs, sample = twice / (2 * outputs);  // source, times 2 outputs
    if (twice >= 0 && sample * 2 * outputs == twice) low = sample, part = A(0);
  }
  low = low > samples - 1 ? samples - 1 : low;
  const int64_t high = low + (low < samples - 1 ? 1 : 0);
  return {low, high, A(1) - part, part};
}

// The first output at or after which the lower sample is at least `sample`.
template <typename A>
OVSEG_ANYWHERE int64_t first_output(int64_t sample, int64_t samples, int64_t outputs) {
  int64_t at = sample * outputs / samples - 2;
  if (at < 0) at = 0;
  while (at < outputs && between<A>(at, samples, outputs).low < sample) ++at;
  return at;
}

// A sample of weight zero does not count, be it infinite.
template <typename A>
OVSEG_ANYWHERE A weighted(A weight, A x) {
  return weight == A(0) ? A(0) : weight * x;
}

}  // namespace ovseg
