// patch_text_similarity: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/patch_text_similarity.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

enum class Pool : int { vector = 0, score = 1, max = 2 };
enum class Weight : int { softmax = 0, sigmoid = 1 };

// A is the accumulation type: double for float64 inputs, float for all others.
template <typename A>
struct PatchTextParams {
  int64_t B, T, N, D;
  Pool pool;
  Weight weight;
  Type type;  // of patches, texts and their gradients
  const void* patches;
  int64_t patch_strides[3];
  const void* texts;
  int64_t text_strides[2];
  const bool* mask;  // [B, N] with mask_strides, or null
  int64_t mask_strides[2];
  A scale, bias;  // softmax: weights ~ exp(scale s); sigmoid: 1 / (1 + exp(-(scale s + bias)))

  A* similarity;  // [B, T], forward: written; backward: read
  A* lse;         // [B, T] log of the sum of weights
  A* norm;        // [B, T] length of the pooled vector; null unless pool == vector

  // Backward only.
  const A* grad;         // [B, T]
  void* grad_patches;    // [B, N, D] contiguous, or null
  void* grad_texts;      // [T, D] contiguous, or null
  A* slot_texts;         // [slots, T, D] partial sums, or null
  double* slot_scalars;  // [slots, 2] partial sums of d scale, d bias
  int64_t slots;

  // Prepared once for all images by prepare_texts().
  A* unit_texts;    // [T, D]
  A* text_norms;    // [T]
  A* packed_texts;  // the same, packed tile by tile for the product with the coefficients
};

// One table per instruction set; cpu_table() picks the best one that this processor runs.
template <typename A>
struct PatchTextTable {
  const char* isa;
  int64_t (*packed_texts_size)(int64_t T, int64_t D);
  int64_t (*workspace_size)(const PatchTextParams<A>&);  // elements of A for one thread
  void (*prepare_texts)(const PatchTextParams<A>&);
  void (*forward_images)(const PatchTextParams<A>&, int64_t begin, int64_t end, A* workspace);
  void (*backward_slots)(const PatchTextParams<A>&, int64_t begin, int64_t end, A* workspace);
  void (*finish_texts)(const PatchTextParams<A>&, int64_t begin, int64_t end);  // rows of grad_texts
};

OVSEG_PER_ISA(template <typename A> const PatchTextTable<A>& patch_text_table();)

}  // namespace ovseg
