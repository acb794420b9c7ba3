// upsample_mask_loss: registration for the CPU.
#include "upsample_mask_loss_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A, typename Work>
void each_map(const MaskLossInputs<A>& in, const MaskLossTable<A>& table, const Work& work) {
  const int64_t size = table.workspace_size(in.p);
  parallel_with_workspace<A>(in.logits, in.p.B * in.p.C, size, in.logits.scalar_type(),
                             [&](int64_t begin, int64_t end, A* memory) { work(in.p, begin, end, memory); });
}

template <typename A>
MaskLossOutputs forward_as(MaskLossInputs<A> in) {
  const MaskLossTable<A>& table = OVSEG_BEST_ISA(mask_loss_table<A>());
  MaskLossOutputs found = in.outputs();
  each_map(in, table, table.forward);
  return found;
}

MaskLossOutputs forward(Tensor logits, Tensor codes, double alpha, double gamma) {
  return with_mask_loss_inputs(logits, codes, alpha, gamma, [](const auto& in) { return forward_as(in); });
}

template <typename A>
Tensor backward_as(MaskLossInputs<A> in, const Tensor& grad_focal, const Tensor& grad_dice, const Tensor& sums) {
  const MaskLossTable<A>& table = OVSEG_BEST_ISA(mask_loss_table<A>());
  MaskLossGradient<A> gradient(in, grad_focal, grad_dice, sums);
  each_map(in, table, table.backward);
  return gradient.grad;
}

Tensor backward(Tensor grad_focal, Tensor grad_dice, Tensor logits, Tensor codes, Tensor sums, double alpha,
                double gamma) {
  return with_mask_loss_inputs(logits, codes, alpha, gamma,
                               [&](const auto& in) { return backward_as(in, grad_focal, grad_dice, sums); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("upsample_mask_loss", TORCH_BOX(&forward));
  m.impl("upsample_mask_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
