// window_argmax on CUDA: entry points. No torch and no device code here.
#pragma once
#include "window_argmax.h"

namespace ovseg {

// For what a tile has room in shared memory: lines of the canvas, and windows at a time.
struct WindowPlan {
  int32_t down, across, windows;
};

// How many numbers the softmax of windows keeps for a call; 0 for all others.
template <typename A>
int64_t window_norms(const WindowParams<A>& p) {
  return p.activation == Activation::softmax && p.stage == Stage::window ? 2 * p.n * p.hc * p.wc : 0;
}

template <typename A>
const char* window_argmax_on_device(const WindowParams<A>& p, A* norms, void* stream);  // null, or the text of an error

}  // namespace ovseg
