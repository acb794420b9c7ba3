// The gradient of the symmetric InfoNCE loss by one logit: contrastive_loss (5), similarity_contrastive_loss (4).
#pragma once
#include "device.cuh"

namespace ovseg {

// What a pair knows of its row, or of its column.
template <typename A>
struct InfoNceSide {
  A weight, log_sum_exp;
  const A* positives;  // how many, or the sum of their weights: read only by those that are one

  // Item i of n, from its weight and the statistics [3, n] of the forward.
  __device__ static InfoNceSide of(const A* weights, const A* statistics, int64_t i, int64_t n) {
    return {weights[i], statistics[i], statistics + 2 * n + i};
  }
  __device__ A gradient(A z, bool positive) const {
    if (weight == A(0)) return A(0);  // it has no positive, and may have no finite log-sum-exp
    const A attracted = weight * exp(z - log_sum_exp);
    return positive ? attracted - weight / *positives : attracted;
  }
  // The two terms of a gradient whose positives have weights; the second where that of the pair is not 0.
  __device__ A of_softmax(A z) const { return gradient(z, false); }
  __device__ A of_target(A positive) const { return weight * (positive / *positives); }
};

}  // namespace ovseg
