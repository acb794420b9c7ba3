// The gradient of the symmetric InfoNCE loss by one logit: similarity_contrastive_loss (4).
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
  // The two terms of the gradient; the second where the weight of the pair is not 0.
  __device__ A of_softmax(A z) const {
    return weight == A(0) ? A(0) : weight * exp(z - log_sum_exp);  // no positive, and perhaps no finite log-sum-exp
  }
  __device__ A of_target(A positive) const { return weight * (positive / *positives); }
};

}  // namespace ovseg
