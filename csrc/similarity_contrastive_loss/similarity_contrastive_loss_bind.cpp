// similarity_contrastive_loss: from tensors to parameters, and registration for the CPU.
#include <tuple>

#include "../common/tensors.h"
#include "similarity_contrastive_loss.h"

namespace ovseg {
namespace {

using Optional = std::optional<Tensor>;

// Owns what the parameters point to; the inputs arrive as float32 or float64 (Python casts lower precision up).
template <typename A>
struct Inputs {
  Tensor similarity;
  Optional image_ids, text_ids, pair_mask;
  SimilarityLossParams<A> p{};

  Inputs(const Tensor& similarity_, const Tensor& scale, const Optional& image_ids_, const Optional& text_ids_,
         const Optional& pair_mask_, int64_t offset)
      : similarity(similarity_),
        image_ids(contiguous(image_ids_)),
        text_ids(contiguous(text_ids_)),
        pair_mask(contiguous(pair_mask_)) {
    STD_TORCH_CHECK(similarity.dim() == 2, "similarity has ", similarity.dim(), " dimensions; expected 2, [B, T]");
    p.B = similarity.size(0), p.T = similarity.size(1);
    for (int i = 0; i < 2; ++i) p.strides[i] = similarity.stride(i);
    p.similarity = data<A>(similarity);
    STD_TORCH_CHECK(scale.numel() == 1, "logit_scale has ", scale.numel(), " elements; expected 1");
    check_type("logit_scale", scale, similarity.scalar_type());
    p.scale = *data<A>(scale);
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
    p.offset = offset;
  }
  static Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }
};

template <typename A>
std::tuple<Tensor, Tensor> stats_as(Inputs<A> in) {
  Tensor rows = new_tensor(in.similarity, {3, in.p.B}, in.similarity.scalar_type());
  Tensor columns = new_tensor(in.similarity, {3, in.p.T}, in.similarity.scalar_type());
  in.p.rows = data<A>(rows), in.p.columns = data<A>(columns);
  torch::stable::parallel_for(0, in.p.B, 16,
                              [&](int64_t begin, int64_t end) { similarity_loss_rows(in.p, begin, end); });
  torch::stable::parallel_for(0, in.p.T, 64,
                              [&](int64_t begin, int64_t end) { similarity_loss_columns(in.p, begin, end); });
  return {rows, columns};
}

std::tuple<Tensor, Tensor> stats(Tensor similarity, Tensor scale, Optional image_ids, Optional text_ids,
                                 Optional pair_mask, int64_t offset) {
  if (similarity.scalar_type() == ScalarType::Double) {
    return stats_as(Inputs<double>(similarity, scale, image_ids, text_ids, pair_mask, offset));
  }
  check_type("similarity", similarity, ScalarType::Float);
  return stats_as(Inputs<float>(similarity, scale, image_ids, text_ids, pair_mask, offset));
}

template <typename A>
std::tuple<Tensor, Tensor> backward_as(const Tensor& grad, Inputs<A> in, const Tensor& rows, const Tensor& columns,
                                       const Tensor& row_weight, const Tensor& column_weight) {
  SimilarityLossParams<A>& p = in.p;
  const ScalarType type = in.similarity.scalar_type();
  check_shape("grad", grad, {}), check_shape("rows", rows, {3, p.B}), check_shape("columns", columns, {3, p.T});
  check_shape("row_weight", row_weight, {p.B}), check_shape("column_weight", column_weight, {p.T});
  const Tensor dense[4] = {torch::stable::contiguous(rows), torch::stable::contiguous(columns),
                           torch::stable::contiguous(row_weight), torch::stable::contiguous(column_weight)};
  for (const Tensor& x : dense) check_type("a saved argument", x, type);
  check_type("grad", grad, type);
  p.grad = *data<A>(grad), p.rows = data<A>(dense[0]), p.columns = data<A>(dense[1]);
  p.row_weight = data<A>(dense[2]), p.column_weight = data<A>(dense[3]);
  Tensor grad_similarity = new_tensor(in.similarity, {p.B, p.T}, type),
         grad_scale = new_tensor(in.similarity, {}, type);
  Tensor partial = new_tensor(in.similarity, {p.B}, ScalarType::Double);
  p.grad_similarity = data<A>(grad_similarity), p.row_scale = data<double>(partial);
  torch::stable::parallel_for(0, p.B, 16, [&](int64_t begin, int64_t end) { similarity_loss_backward(p, begin, end); });
  double sum = 0;
  for (int64_t i = 0; i < p.B; ++i) sum += p.row_scale[i];
  *data<A>(grad_scale) = static_cast<A>(sum);
  return {grad_similarity, grad_scale};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor similarity, Tensor scale, Optional image_ids, Optional text_ids,
                                    Optional pair_mask, Tensor rows, Tensor columns, Tensor row_weight,
                                    Tensor column_weight, int64_t offset) {
  if (similarity.scalar_type() == ScalarType::Double) {
    return backward_as(grad, Inputs<double>(similarity, scale, image_ids, text_ids, pair_mask, offset), rows, columns,
                       row_weight, column_weight);
  }
  check_type("similarity", similarity, ScalarType::Float);
  return backward_as(grad, Inputs<float>(similarity, scale, image_ids, text_ids, pair_mask, offset), rows, columns,
                     row_weight, column_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("similarity_contrastive_stats", TORCH_BOX(&stats));
  m.impl("similarity_contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
