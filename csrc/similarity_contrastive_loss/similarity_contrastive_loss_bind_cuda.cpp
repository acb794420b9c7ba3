// similarity_contrastive_loss: from tensors to parameters, and registration for CUDA.
#include "../common/cuda_tensors.h"
#include "similarity_contrastive_loss_bind.h"
#include "similarity_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

template <typename A>
std::tuple<Tensor, Tensor> stats_as(Inputs<A> in, const Tensor& scale) {
  const OnDevice device(in.similarity);
  const ScalarType type = in.similarity.scalar_type();
  Tensor rows = new_tensor(in.similarity, {3, in.p.B}, type), columns = new_tensor(in.similarity, {3, in.p.T}, type);
  in.p.rows = data<A>(rows), in.p.columns = data<A>(columns);
  SimilarityLossCuda<A> x{};
  x.p = in.p, x.scale = data<A>(scale), x.stream = device.stream();
  check_launch("similarity_contrastive_stats", similarity_loss_stats(x));
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
  const OnDevice device(in.similarity);
  const auto saved = enter_saved(in, grad, rows, columns, row_weight, column_weight);
  const ScalarType type = in.similarity.scalar_type();
  Tensor grad_similarity = new_tensor(in.similarity, {in.p.B, in.p.T}, type);
  Tensor grad_scale = new_tensor(in.similarity, {}, type);
  Tensor partial = new_tensor(in.similarity, {in.p.B}, ScalarType::Double);
  in.p.grad_similarity = data<A>(grad_similarity), in.p.row_scale = data<double>(partial);
  SimilarityLossCuda<A> x{};
  x.p = in.p, x.scale = data<A>(scale), x.grad = data<A>(grad), x.grad_scale = data<A>(grad_scale);
  x.stream = device.stream();
  check_launch("similarity_contrastive_loss_backward", similarity_loss_gradient(x));
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

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("similarity_contrastive_stats", TORCH_BOX(&stats));
  m.impl("similarity_contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
