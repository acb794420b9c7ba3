// upsample_mask_loss: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/upsample_mask_loss.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/resize.h"

namespace ovseg {

constexpr int32_t kIgnored =
    -2;  // code of a pixel that does not count; any other code below 0 is a negative for all classes

// A is the type of all arithmetic: double for float64 logits, float for all others. Everything is contiguous.
template <typename A>
struct MaskLossParams {
  int64_t B, C, h, w, H, W;
  const A* logits;       // [B, C, h, w]
  const int32_t* codes;  // [B, H, W]
  A alpha, gamma;
  A *focal, *dice;                  // [B, C]
  bool* present;                    // [B, C]
  A* sums;                          // [4, B, C]: S_q, S_qy, S_y, pixels that count
  const A *grad_focal, *grad_dice;  // [B, C]
  A* grad;                          // [B, C, h, w]
};

// (2) to (4) of one map from its sums: focal, q, q y, y, pixels that count.
template <typename A, typename S>
OVSEG_ANYWHERE void finish_mask_loss(const MaskLossParams<A>& p, int64_t plane, const S* sum) {
  const S pixels = sum[4] > S(1) ? sum[4] : S(1);
  p.focal[plane] = static_cast<A>(sum[0] / pixels);
  p.dice[plane] = static_cast<A>(S(1) - (S(2) * sum[2] + S(1)) / (sum[1] + sum[3] + S(1)));
  p.present[plane] = sum[3] > S(0);
  for (int64_t k = 0; k < 4; ++k) p.sums[k * p.B * p.C + plane] = static_cast<A>(sum[k + 1]);
}

// What (5) multiplies in one map: focal / n, and dice with and without y.
template <typename A>
struct MaskLossWeights {
  A focal, dice, dice_y;
};

template <typename A>
OVSEG_ANYWHERE MaskLossWeights<A> mask_loss_weights(const MaskLossParams<A>& p, int64_t plane) {
  const int64_t maps = p.B * p.C;
  const A pixels = p.sums[3 * maps + plane];
  const A below = p.sums[plane] + p.sums[2 * maps + plane] + A(1), above = A(2) * p.sums[maps + plane] + A(1);
  const A dice = p.grad_dice[plane] / below;
  return {p.grad_focal[plane] / (pixels > A(1) ? pixels : A(1)), dice * above / below, A(2) * dice};
}

// One table per instruction set: maps [begin, end) of B C.
template <typename A>
struct MaskLossTable {
  int64_t (*workspace_size)(const MaskLossParams<A>&);  // elements of A for one thread
  void (*forward)(const MaskLossParams<A>&, int64_t begin, int64_t end, A* workspace);
  void (*backward)(const MaskLossParams<A>&, int64_t begin, int64_t end, A* workspace);
};

OVSEG_PER_ISA(template <typename A> const MaskLossTable<A>& mask_loss_table();)

}  // namespace ovseg
