// dense_contrastive_loss: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/dense_contrastive_loss.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

enum class Sampling : int { topk = 0, semi = 1, gumbel = 2, random = 3 };

// A is the accumulation type: double for float64 pixels, float for all others. Strides are in elements; the rest is
// contiguous.
template <typename A>
struct DenseParams {
  int64_t B, N, T, D;
  Type type;
  const void* pixels;  // [B, N, D]
  int64_t strides[3];
  const A* texts;            // [T, D], unit
  const int64_t* image_ids;  // [B] and [T], or null: text j belongs to image j
  const int64_t* text_ids;

  // Selection.
  const int64_t* rng;
  int64_t k_pos, k_neg, skip;
  Sampling sampling;
  A inverse_temperature, margin;
  int64_t* positive;  // [T, k_pos] flat pixel indices, -1 where there is none
  int64_t* negative;  // [T, k_neg]

  // Similarities of selected pixels and their gradient.
  int64_t K, rows;           // selected a text; how many of them are returned as unit vectors too
  const int64_t* index;      // [T, K]
  A* similarity;             // [T, K]
  A* unit;                   // [T, rows, D]
  const A* grad_similarity;  // [T, K] or null
  const A* grad_unit;        // [T, rows, D] or null
  const int64_t* order;      // [T K] entries by pixel, then by entry; missing ones first
  void* grad_pixels;         // [B, N, D] or null
  A* grad_texts;             // [T, D] or null
};

// Whether an image is the text's own.
template <typename A>
OVSEG_ANYWHERE bool own(const DenseParams<A>& p, int64_t image, int64_t text) {
  return p.image_ids ? p.image_ids[image] == p.text_ids[text] : image == text;
}

template <typename A>
struct Selected {
  A key;
  int64_t index;
};

// One table per instruction set.
template <typename A>
struct DenseTable {
  int64_t (*workspace_size)(const DenseParams<A>&);  // elements of A for one thread
  int64_t (*packed_size)(const DenseParams<A>&);
  void (*pack)(const DenseParams<A>&, A* packed);
  void (*positives)(const DenseParams<A>&, int64_t begin, int64_t end, Selected<A>* lists, A* lowest, A* workspace);
  // Images of one worker into its lists [T, k_neg + skip] and their lengths [T].
  void (*negatives)(const DenseParams<A>&, int64_t begin, int64_t end, const A* packed, const A* lowest,
                    Selected<A>* lists, int64_t* lengths, A* workspace);
  void (*merge)(const DenseParams<A>&, int64_t begin, int64_t end, int64_t workers, Selected<A>* lists,
                const int64_t* lengths);  // texts; the first worker's list is the result
  void (*gather)(const DenseParams<A>&, int64_t begin, int64_t end, A* workspace);  // texts
  void (*texts)(const DenseParams<A>&, int64_t begin, int64_t end, A* workspace);   // gradient of texts
  void (*pixels)(const DenseParams<A>&, int64_t begin, int64_t end, A* workspace);  // gradient; entries of `order`
};

OVSEG_PER_ISA(template <typename A> const DenseTable<A>& dense_table();)

}  // namespace ovseg
