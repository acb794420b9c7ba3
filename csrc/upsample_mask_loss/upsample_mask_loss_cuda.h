// upsample_mask_loss on CUDA: entry points. No torch and no device code here.
#pragma once
#include "upsample_mask_loss.h"

namespace ovseg {

constexpr int64_t kMaskLossRows = 64, kMaskLossColumns = 128;  // labels of a tile
constexpr int64_t kMaskLossSamples = 8;                        // rows of samples whose gradients a block owns

template <typename A>
OVSEG_ANYWHERE int64_t mask_loss_tiles(const MaskLossParams<A>& p) {
  return (p.H + kMaskLossRows - 1) / kMaskLossRows * ((p.W + kMaskLossColumns - 1) / kMaskLossColumns);
}

// Blocks that share a map, each with some of its tiles.
template <typename A>
int64_t mask_loss_splits(const MaskLossParams<A>& p) {
  const int64_t wanted = (mask_loss_tiles(p) + 1) / 2;
  return wanted < 64 ? wanted : 64;
}

// parts: [splits, 5, B C]. Null, or the text of an error.
template <typename A>
const char* upsample_mask_loss_on_device(const MaskLossParams<A>& p, double* parts, void* stream);
template <typename A>
const char* upsample_mask_loss_backward_on_device(const MaskLossParams<A>& p, void* stream);

}  // namespace ovseg
