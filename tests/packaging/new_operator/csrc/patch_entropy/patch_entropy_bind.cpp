// patch_entropy: registration for the CPU.
#include "../common/isa.h"
#include "../common/tensors.h"
#include "patch_entropy.h"

namespace ovseg {
namespace {

template <typename A>
PatchEntropyParams<A> parameters(const Tensor& scores) {
  PatchEntropyParams<A> p{};
  p.B = scores.size(0), p.N = scores.size(1), p.scores = data<A>(scores);
  return p;
}

Tensor checked(const Tensor& scores) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores has ", scores.dim(), " dimensions; expected 2, [B, N]");
  STD_TORCH_CHECK(scores.size(1) > 0, "scores has no patch");
  if (scores.scalar_type() != ScalarType::Double) check_type("scores", scores, ScalarType::Float);
  return torch::stable::contiguous(scores);
}

template <typename A>
Tensor forward_as(const Tensor& scores) {
  PatchEntropyParams<A> p = parameters<A>(scores);
  Tensor entropy = new_tensor(scores, {p.B}, scores.scalar_type());
  p.entropy = data<A>(entropy);
  const PatchEntropyTable<A>& table = OVSEG_BEST_ISA(patch_entropy_table<A>());
  torch::stable::parallel_for(0, p.B, 16, [&](int64_t begin, int64_t end) { table.forward(p, begin, end); });
  return entropy;
}

Tensor forward(Tensor given) {
  const Tensor scores = checked(given);
  return scores.scalar_type() == ScalarType::Double ? forward_as<double>(scores) : forward_as<float>(scores);
}

template <typename A>
Tensor backward_as(const Tensor& grad, const Tensor& scores) {
  PatchEntropyParams<A> p = parameters<A>(scores);
  check_shape("grad", grad, {p.B}), check_type("grad", grad, scores.scalar_type());
  Tensor grad_scores = new_tensor(scores, {p.B, p.N}, scores.scalar_type());
  const Tensor dense = torch::stable::contiguous(grad);
  p.grad = data<A>(dense), p.grad_scores = data<A>(grad_scores);
  const PatchEntropyTable<A>& table = OVSEG_BEST_ISA(patch_entropy_table<A>());
  torch::stable::parallel_for(0, p.B, 16, [&](int64_t begin, int64_t end) { table.backward(p, begin, end); });
  return grad_scores;
}

Tensor backward(Tensor grad, Tensor given) {
  const Tensor scores = checked(given);
  return scores.scalar_type() == ScalarType::Double ? backward_as<double>(grad, scores)
                                                    : backward_as<float>(grad, scores);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("patch_entropy", TORCH_BOX(&forward));
  m.impl("patch_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
