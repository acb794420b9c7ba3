// Log-sum-exp of a row as it is walked, with its positives. Two of them merge in a fixed order; a NaN stays one.
#pragma once
#include "device.cuh"

namespace ovseg {

template <typename A>
struct RowStatistics {
  A top, sum, hits, positives;  // hits: sum of positive logits

  __device__ void clear() {
    top = minus_infinity<A>();
    sum = hits = positives = 0;
  }
  __device__ void add(A z, bool positive) {
    const A now = larger(z, top);
    sum = (top == now ? sum : sum * exp(top - now)) + (z == now ? A(1) : exp(z - now));
    top = now;
    if (positive) hits += z, positives += 1;
  }
  __device__ void merge(const RowStatistics& other) {
    const A now = larger(other.top, top);
    if (now != minus_infinity<A>()) {
      sum =
          (top == now ? sum : sum * exp(top - now)) + (other.top == now ? other.sum : other.sum * exp(other.top - now));
      top = now;
    }
    hits += other.hits, positives += other.positives;
  }
  __device__ A log_sum_exp() const { return sum == A(0) ? minus_infinity<A>() : top + log(sum); }
};

}  // namespace ovseg
