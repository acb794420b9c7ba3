// similarity_contrastive_loss: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/similarity_contrastive_loss.py.
#pragma once
#include "../common/types.h"

namespace ovseg {

// A is the type of similarity and of all sums: float or double.
template <typename A>
struct SimilarityLossParams {
  int64_t B, T;
  const A* similarity;  // [B, T]
  int64_t strides[2];
  A scale;
  const int64_t* image_ids;  // [B] and [T], or null: the positive of row i is column i + offset
  const int64_t* text_ids;
  const bool* pair_mask;        // [B, T] contiguous, or null; false leaves the pair out
  const uint8_t* positives;     // [B, T], or null; takes the place of the ids
  bool weighted;                // they are weights, of type A, and no bytes of a bool
  int64_t positive_strides[2];  // in elements
  int64_t offset;

  A* rows;     // [3, B]: log-sum-exp, sum of p z, sum of p
  A* columns;  // [3, T]: the same over the rows

  // Backward only.
  A grad;
  const A* row_weight;     // [B]
  const A* column_weight;  // [T]
  A* grad_similarity;      // [B, T] contiguous
  double* row_scale;       // [B] partial sums of d scale

  // p_ij. One value for all kinds of positives, and one arithmetic with it: equal pairs give equal bits.
  OVSEG_ANYWHERE_MEMBER A weight(int64_t i, int64_t j) const {
    if (image_ids) return static_cast<A>(image_ids[i] == text_ids[j]);
    if (!positives) return static_cast<A>(j == i + offset);
    const int64_t at = i * positive_strides[0] + j * positive_strides[1];
    return weighted ? reinterpret_cast<const A*>(positives)[at] : static_cast<A>(positives[at] != 0);
  }
  OVSEG_ANYWHERE_MEMBER bool kept(int64_t i, int64_t j) const { return !pair_mask || pair_mask[i * T + j]; }
};

template <typename A>
void similarity_loss_rows(const SimilarityLossParams<A>& p, int64_t begin, int64_t end);
template <typename A>
void similarity_loss_columns(const SimilarityLossParams<A>& p, int64_t begin, int64_t end);
template <typename A>
void similarity_loss_backward(const SimilarityLossParams<A>& p, int64_t begin, int64_t end);

}  // namespace ovseg
