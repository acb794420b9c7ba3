// window_argmax: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/window_argmax.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/resize.h"

namespace ovseg {

enum class Activation : int { none = 0, sigmoid = 1, softmax = 2 };
enum class Stage : int { window = 0, merged = 1, output = 2 };

constexpr int64_t kPrunedTile = 16;  // outputs a side that are pruned together

// A is the type of all arithmetic: double for float64 values, float for all others. Everything is contiguous.
template <typename A>
struct WindowParams : LabelRule<A> {
  int64_t n, C, h, w, G;   // windows, classes, samples of a window, groups
  int64_t hc, wc, Hc, Wc;  // crop and canvas
  const A* values;         // [n, C, h, w], or tables [n, G, C] where there is an index
  const int16_t* index;    // [n, hc, wc] or null
  const int64_t* origins;  // [n, 2]
  Activation activation;
  Stage stage;
};

// One table per instruction set: tiles [begin, end) of those of the label map, row by row.
template <typename A>
struct WindowTable {
  int64_t (*workspace_size)(const WindowParams<A>&);  // elements of A for one thread
  void (*tiles)(const WindowParams<A>&, int64_t begin, int64_t end, A* workspace);
};

OVSEG_PER_ISA(template <typename A> const WindowTable<A>& window_table();)

}  // namespace ovseg
