// upsample_mask_loss: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include <tuple>

#include "../common/tensors.h"
#include "upsample_mask_loss.h"

namespace ovseg {

using MaskLossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename A>
struct MaskLossInputs {
  Tensor logits, codes;
  MaskLossParams<A> p{};

  MaskLossInputs(const Tensor& logits_, const Tensor& codes_, double alpha, double gamma)
      : logits(torch::stable::contiguous(logits_)), codes(torch::stable::contiguous(codes_)) {
    STD_TORCH_CHECK(logits.dim() == 4, "logits has ", logits.dim(), " dimensions; expected 4, [B, C, h, w]");
    STD_TORCH_CHECK(codes.dim() == 3, "codes has ", codes.dim(), " dimensions; expected 3, [B, H, W]");
    p.B = logits.size(0), p.C = logits.size(1), p.h = logits.size(2), p.w = logits.size(3);
    p.H = codes.size(1), p.W = codes.size(2);
    STD_TORCH_CHECK(p.C > 0 && p.h > 0 && p.w > 0 && p.H > 0 && p.W > 0, "logits or codes have an empty dimension");
    check_shape("codes", codes, {p.B, p.H, p.W}), check_type("codes", codes, ScalarType::Int);
    p.logits = data<A>(logits), p.codes = data<int32_t>(codes);
    p.alpha = static_cast<A>(alpha), p.gamma = static_cast<A>(gamma);
  }

  MaskLossOutputs outputs() {
    const ScalarType type = logits.scalar_type();
    Tensor focal = new_tensor(logits, {p.B, p.C}, type), dice = new_tensor(logits, {p.B, p.C}, type);
    Tensor present = new_tensor(logits, {p.B, p.C}, ScalarType::Bool), sums = new_tensor(logits, {4, p.B, p.C}, type);
    p.focal = data<A>(focal), p.dice = data<A>(dice), p.present = data<bool>(present), p.sums = data<A>(sums);
    return {focal, dice, present, sums};
  }
};

template <typename A>
struct MaskLossGradient {
  Tensor grad_focal, grad_dice, sums, grad;

  MaskLossGradient(MaskLossInputs<A>& in, const Tensor& grad_focal_, const Tensor& grad_dice_, const Tensor& sums_)
      : grad_focal(torch::stable::contiguous(grad_focal_)),
        grad_dice(torch::stable::contiguous(grad_dice_)),
        sums(torch::stable::contiguous(sums_)),
        grad(new_tensor(in.logits, {in.p.B, in.p.C, in.p.h, in.p.w}, in.logits.scalar_type())) {
    const ScalarType type = in.logits.scalar_type();
    check_shape("grad_focal", grad_focal, {in.p.B, in.p.C}), check_type("grad_focal", grad_focal, type);
    check_shape("grad_dice", grad_dice, {in.p.B, in.p.C}), check_type("grad_dice", grad_dice, type);
    check_shape("sums", sums, {4, in.p.B, in.p.C}), check_type("sums", sums, type);
    in.p.grad_focal = data<A>(grad_focal), in.p.grad_dice = data<A>(grad_dice);
    in.p.sums = data<A>(sums), in.p.grad = data<A>(grad);
  }
};

// run(inputs) in the type of the logits, which Python has made float32 or float64.
template <typename Run>
auto with_mask_loss_inputs(const Tensor& logits, const Tensor& codes, double alpha, double gamma, const Run& run) {
  if (logits.scalar_type() == ScalarType::Double) return run(MaskLossInputs<double>(logits, codes, alpha, gamma));
  check_type("logits", logits, ScalarType::Float);
  return run(MaskLossInputs<float>(logits, codes, alpha, gamma));
}

}  // namespace ovseg
