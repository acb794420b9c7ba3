// similarity_contrastive_loss: what the bind files of all devices share.
#pragma once
#include <array>
#include <tuple>

#include "../common/tensors.h"
#include "similarity_contrastive_loss.h"

namespace ovseg {

using Optional = std::optional<Tensor>;

// Which pairs take part and which are positive, as they arrive.
struct Pairs {
  Optional image_ids, text_ids, pair_mask, positives;
};

// Owns what the parameters point to; the inputs arrive as float32 or float64 (Python casts lower precision up).
template <typename A>
struct Inputs {
  Tensor similarity;
  Optional image_ids, text_ids, pair_mask, positives;
  SimilarityLossParams<A> p{};

  Inputs(const Tensor& similarity_, const Tensor& scale, const Pairs& pairs, int64_t offset)
      : similarity(similarity_),
        image_ids(contiguous(pairs.image_ids)),
        text_ids(contiguous(pairs.text_ids)),
        pair_mask(contiguous(pairs.pair_mask)),
        positives(pairs.positives) {
    STD_TORCH_CHECK(similarity.dim() == 2, "similarity has ", similarity.dim(), " dimensions; expected 2, [B, T]");
    p.B = similarity.size(0), p.T = similarity.size(1);
    for (int i = 0; i < 2; ++i) p.strides[i] = similarity.stride(i);
    p.similarity = data<A>(similarity);
    STD_TORCH_CHECK(scale.numel() == 1, "logit_scale has ", scale.numel(), " elements; expected 1");
    check_type("logit_scale", scale, similarity.scalar_type());
    STD_TORCH_CHECK(image_ids.has_value() == text_ids.has_value(), "image_ids and text_ids go together");
    if (image_ids) {
      check_shape("image_ids", *image_ids, {p.B}), check_shape("text_ids", *text_ids, {p.T});
      check_type("image_ids", *image_ids, ScalarType::Long), check_type("text_ids", *text_ids, ScalarType::Long);
      p.image_ids = data<int64_t>(*image_ids), p.text_ids = data<int64_t>(*text_ids);
    }
    if (pair_mask) {
      check_shape("pair_mask", *pair_mask, {p.B, p.T}), check_type("pair_mask", *pair_mask, ScalarType::Bool);
      p.pair_mask = data<bool>(*pair_mask);
    }
    if (positives) enter_positives();
    p.offset = offset;
  }
  void enter_positives() {  // where they lie: no copy of [B, T]
    STD_TORCH_CHECK(!image_ids, "positives take the place of image_ids and text_ids; expected one of the two");
    check_shape("positives", *positives, {p.B, p.T});
    for (int i = 0; i < 2; ++i) p.positive_strides[i] = positives->stride(i);
    p.weighted = positives->scalar_type() != ScalarType::Bool;
    if (p.weighted) check_type("positives", *positives, similarity.scalar_type());
    p.positives = data<uint8_t>(*positives);
  }
  static Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }
};

// run(inputs) in the type of the similarities.
template <typename Run>
auto with_inputs(const Tensor& similarity, const Tensor& scale, const Pairs& pairs, int64_t offset, const Run& run) {
  if (similarity.scalar_type() == ScalarType::Double) {
    return run(Inputs<double>(similarity, scale, pairs, offset));
  }
  check_type("similarity", similarity, ScalarType::Float);
  return run(Inputs<float>(similarity, scale, pairs, offset));
}

// rows, columns and their weights, contiguous, checked and entered into the parameters.
template <typename A>
std::array<Tensor, 4> enter_saved(Inputs<A>& in, const Tensor& grad, const Tensor& rows, const Tensor& columns,
                                  const Tensor& row_weight, const Tensor& column_weight) {
  SimilarityLossParams<A>& p = in.p;
  check_shape("grad", grad, {}), check_shape("rows", rows, {3, p.B}), check_shape("columns", columns, {3, p.T});
  check_shape("row_weight", row_weight, {p.B}), check_shape("column_weight", column_weight, {p.T});
  std::array<Tensor, 4> dense = {torch::stable::contiguous(rows), torch::stable::contiguous(columns),
                                 torch::stable::contiguous(row_weight), torch::stable::contiguous(column_weight)};
  for (const Tensor& x : dense) check_type("a saved argument", x, in.similarity.scalar_type());
  check_type("grad", grad, in.similarity.scalar_type());
  p.rows = data<A>(dense[0]), p.columns = data<A>(dense[1]);
  p.row_weight = data<A>(dense[2]), p.column_weight = data<A>(dense[3]);
  return dense;
}

}  // namespace ovseg
