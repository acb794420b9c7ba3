// Log-sum-exp of a row as it is walked, with its positives. Two of them merge in a fixed order; a NaN stays one.
#pragma once
#include "device.cuh"

namespace ovseg {

template <typename A>
struct RowStatistics {
  A top, sum, hits, positives;  // hits: sum of positive logits; both sums are weighted where weights are given

  __device__ void clear() {
    top = minus_infinity<A>();
    sum = hits = positives = 0;
  }
  __device__ void add(A z, bool positive) {
    add_to_lse(z);
    if (positive) hits += z, positives += 1;
  }
  __device__ void add_weighted(A z, A weight) {
    add_to_lse(z);
    if (weight != A(0)) hits += weight * z, positives += weight;  // zero times an infinite z is NaN
  }
  __device__ void add_to_lse(A z) {
    const A now = larger(z, top);
    sum = (top == now ? sum : sum * exp(top - now)) + (z == now ? A(1) : exp(z - now));
    top = now;
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
