// similarity_contrastive_loss: from tensors to parameters, and registration for the CPU.
#include "similarity_contrastive_loss_bind.h"

namespace ovseg {
namespace {

template <typename A>
std::tuple<Tensor, Tensor> stats_as(Inputs<A> in, const Tensor& scale) {
  in.p.scale = *data<A>(scale);
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
                                 Optional pair_mask, Optional positives, int64_t offset) {
  return with_inputs(similarity, scale, {image_ids, text_ids, pair_mask, positives}, offset,
                     [&](const auto& in) { return stats_as(in, scale); });
}

template <typename A>
std::tuple<Tensor, Tensor> backward_as(const Tensor& grad, Inputs<A> in, const Tensor& scale, const Tensor& rows,
                                       const Tensor& columns, const Tensor& row_weight, const Tensor& column_weight) {
  const auto saved = enter_saved(in, grad, rows, columns, row_weight, column_weight);
  SimilarityLossParams<A>& p = in.p;
  const ScalarType type = in.similarity.scalar_type();
  p.scale = *data<A>(scale), p.grad = *data<A>(grad);
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
                                    Optional pair_mask, Optional positives, Tensor rows, Tensor columns,
                                    Tensor row_weight, Tensor column_weight, int64_t offset) {
  return with_inputs(similarity, scale, {image_ids, text_ids, pair_mask, positives}, offset, [&](const auto& in) {
    return backward_as(grad, in, scale, rows, columns, row_weight, column_weight);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("similarity_contrastive_stats", TORCH_BOX(&stats));
  m.impl("similarity_contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
