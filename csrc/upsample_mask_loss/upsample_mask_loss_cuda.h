// upsample_mask_loss on CUDA: entry points. No torch and no device code here.
#pragma once
#include "upsample_mask_loss.h"

namespace ovseg {

// Blocks that share a map, each with a range of its pixels.
template <typename A>
int64_t mask_loss_splits(const MaskLossParams<A>& p) {
  const int64_t wanted = (p.H * p.W + 16383) / 16384;
  return wanted < 1 ? 1 : wanted < 64 ? wanted : 64;
}

// parts: [splits, 5, B C]; counts: [B]. Null, or the text of an error.
template <typename A>
const char* upsample_mask_loss_on_device(const MaskLossParams<A>& p, A* parts, void* stream);
template <typename A>
const char* upsample_mask_loss_backward_on_device(const MaskLossParams<A>& p, A* counts, void* stream);

}  // namespace ovseg
