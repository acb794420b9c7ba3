// center_assignment: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/center_assignment.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

enum class Normalizer : int { mean = 0, mean_plus_one = 1, sum = 2 };

// A is the accumulation type: double for float64 inputs, float for all others. Strides are in elements.
template <typename A>
struct CenterParams {
  int64_t B, G, L, D, E;
  Type type;  // of queries, keys, values and their gradients
  const void* queries;
  int64_t query_strides[3];
  const void* keys;
  int64_t key_strides[3];
  const void* values;
  int64_t value_strides[3];
  const A* center_bias;  // [B, G] contiguous, or null
  const A* key_scale;    // [B, L] contiguous, or null
  bool biased, scaled;   // whether they were given: one without elements has no address
  const bool* mask;      // [B, L] with mask_strides, or null
  int64_t mask_strides[2];
  const A* noise;  // [B, G, L] with noise_strides, or null
  int64_t noise_strides[3];
  const int64_t* rng;  // seed and offset, or null
  A scale, tau;
  bool hard;
  Normalizer normalizer;

  A* pooled;       // [B, G, E]; forward: written; backward: read
  int64_t* index;  // [B, L]
  A* count;        // [B, G]
  A* soft;         // [B, G, L] or null, forward only

  // Backward only. Null for a gradient that is not wanted.
  const A* grad;        // [B, G, E]
  const A* grad_count;  // [B, G] or null
  const A* grad_soft;   // [B, G, L] or null
  bool shared;          // the values are the keys, and grad_keys takes both gradients
  void *grad_queries, *grad_keys, *grad_values;
  A *grad_bias, *grad_scale;  // [B, G] and [B, L], of center_bias and key_scale
};

// One table per instruction set. Work is split into slots of consecutive tokens of one image, a function of L alone.
template <typename A>
struct CenterTable {
  int64_t (*workspace_size)(const CenterParams<A>&);  // elements of A for one thread
  // Partial sums of a slot: [G, E] and the counts [G] forward, [G, D] and the bias [G] backward.
  void (*forward_slots)(const CenterParams<A>&, int64_t begin, int64_t end, A* partial, A* workspace);
  void (*finish_forward)(const CenterParams<A>&, int64_t begin, int64_t end, const A* partial);  // images
  void (*backward_slots)(const CenterParams<A>&, int64_t begin, int64_t end, A* partial, A* workspace);
  void (*finish_backward)(const CenterParams<A>&, int64_t begin, int64_t end, A* partial);  // images
};

constexpr int64_t kCenterSlot = 128;  // tokens
constexpr int64_t center_slots(int64_t L) { return (L + kCenterSlot - 1) / kCenterSlot; }

OVSEG_PER_ISA(template <typename A> const CenterTable<A>& center_table();)

}  // namespace ovseg
