// window_argmax on CUDA: entry points. No torch and no device code here.
#pragma once
#include "window_argmax.h"

namespace ovseg {

// How many numbers the softmax keeps for a call; 0 without softmax.
template <typename A>
int64_t window_norms(const WindowParams<A>& p) {
  if (p.activation != Activation::softmax) return 0;
  const int64_t pixels = p.stage == Stage::window   ? p.n * p.hc * p.wc
                         : p.stage == Stage::merged ? p.Hc * p.Wc
                                                    : p.H * p.W;
  return 2 * pixels;
}

template <typename A>
const char* window_argmax_on_device(const WindowParams<A>& p, A* norms, void* stream);  // null, or the text of an error

}  // namespace ovseg
