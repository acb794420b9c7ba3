// contrastive_loss: registration for CUDA.
#include "../common/cuda_tensors.h"
#include "contrastive_loss_bind.h"
#include "contrastive_loss_cuda.h"

namespace ovseg {
namespace {

template <typename A>
ContrastiveCuda<A> on_device(const ContrastiveInputs<A>& in, bool tf32, const Tensor& memory, const OnDevice& device) {
  ContrastiveCuda<A> x{};
  x.p = in.p, x.scale = data<A>(in.scale), x.bias = data<A>(in.bias), x.tf32 = tf32;
  x.workspace = data<unsigned char>(memory), x.stream = device.stream();
  return x;
}

template <typename A>
ContrastiveStats stats_as(ContrastiveInputs<A> in, bool tf32) {
  const OnDevice device(in.image);
  ContrastiveStats outputs = in.outputs();
  if (in.p.sigmoid) torch::stable::zero_(std::get<1>(outputs));
  const Tensor memory = workspace_of(in.image, contrastive_workspace(in.p, false));
  check_launch("contrastive_stats", contrastive_statistics(on_device(in, tf32, memory, device)));
  return outputs;
}

ContrastiveStats stats(Tensor image, Tensor text, Tensor scale, Tensor bias, Optional image_ids, Optional text_ids,
                       Optional pair_weights, int64_t offset, bool sigmoid, bool tf32) {
  return with_contrastive_inputs(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid,
                                 [&](const auto& in) { return stats_as(in, tf32); });
}

template <typename A>
ContrastiveGradients backward_as(ContrastiveInputs<A> in, const Tensor& grad, bool tf32, bool need_image,
                                 bool need_text) {
  const OnDevice device(in.image);
  ContrastiveGradients found = in.gradients(need_image, need_text);
  if (in.p.B == 0 || in.p.T == 0) {
    torch::stable::zero_(std::get<0>(found)), torch::stable::zero_(std::get<1>(found));
    torch::stable::zero_(std::get<2>(found)), torch::stable::zero_(std::get<3>(found));
    return found;
  }
  const Tensor memory = workspace_of(in.image, contrastive_workspace(in.p, true));
  ContrastiveCuda<A> x = on_device(in, tf32, memory, device);
  x.grad = data<A>(grad), x.grad_scale = data<A>(std::get<2>(found)), x.grad_bias = data<A>(std::get<3>(found));
  check_launch("contrastive_loss_backward", contrastive_gradient(x));
  return found;
}

ContrastiveGradients backward(Tensor grad, Tensor image, Tensor text, Tensor scale, Tensor bias, Optional image_ids,
                              Optional text_ids, Optional pair_weights, Tensor rows, Tensor columns, Tensor row_weight,
                              Tensor column_weight, int64_t offset, bool sigmoid, bool tf32, bool need_image,
                              bool need_text) {
  return with_contrastive_inputs(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid,
                                 [&](auto in) {
                                   in.enter_saved(grad, rows, columns, row_weight, column_weight);
                                   return backward_as(in, grad, tf32, need_image, need_text);
                                 });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("contrastive_stats", TORCH_BOX(&stats));
  m.impl("contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
