// upsample_mask_loss: registration for CUDA.
#include "../common/cuda_tensors.h"
#include "upsample_mask_loss_bind.h"
#include "upsample_mask_loss_cuda.h"

namespace ovseg {
namespace {

template <typename A>
MaskLossOutputs forward_as(MaskLossInputs<A> in) {
  const OnDevice device(in.logits);
  MaskLossOutputs found = in.outputs();
  Tensor parts = new_tensor(in.logits, {mask_loss_splits(in.p), 5, in.p.B * in.p.C}, ScalarType::Double);
  check_launch("upsample_mask_loss", upsample_mask_loss_on_device(in.p, data<double>(parts), device.stream()));
  return found;
}

MaskLossOutputs forward(Tensor logits, Tensor codes, double alpha, double gamma) {
  return with_mask_loss_inputs(logits, codes, alpha, gamma, [](const auto& in) { return forward_as(in); });
}

template <typename A>
Tensor backward_as(MaskLossInputs<A> in, const Tensor& grad_focal, const Tensor& grad_dice, const Tensor& sums) {
  const OnDevice device(in.logits);
  MaskLossGradient<A> gradient(in, grad_focal, grad_dice, sums);
  check_launch("upsample_mask_loss", upsample_mask_loss_backward_on_device(in.p, device.stream()));
  return gradient.grad;
}

Tensor backward(Tensor grad_focal, Tensor grad_dice, Tensor logits, Tensor codes, Tensor sums, double alpha,
                double gamma) {
  return with_mask_loss_inputs(logits, codes, alpha, gamma,
                               [&](const auto& in) { return backward_as(in, grad_focal, grad_dice, sums); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("upsample_mask_loss", TORCH_BOX(&forward));
  m.impl("upsample_mask_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
