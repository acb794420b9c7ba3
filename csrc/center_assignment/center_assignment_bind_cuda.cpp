// center_assignment: registration for CUDA.
#include "../common/cuda_tensors.h"
#include "center_assignment_bind.h"
#include "center_assignment_cuda.h"

namespace ovseg {
namespace {

template <typename A>
CenterOutputs forward_as(const Tensor& like, CenterParams<A> p, bool want_soft) {
  const OnDevice device(like);
  CenterOutputs outputs = center_outputs(p, like, want_soft);
  if (p.B == 0) return outputs;
  const Tensor memory = workspace_of(like, center_workspace(p, false));
  check_launch("center_assignment", center_forward<A>({p, data<unsigned char>(memory), device.stream()}));
  return outputs;
}

CenterOutputs forward(Tensor queries, Tensor keys, Tensor values, Optional center_bias, Optional key_scale,
                      Optional mask, Optional noise, Optional rng, double scale, double tau, bool hard,
                      int64_t normalizer, bool want_soft) {
  return with_center_params(queries, keys, values, center_bias, key_scale, mask, noise, rng, scale, tau, hard,
                            normalizer, [&](const auto& p) { return forward_as(queries, p, want_soft); });
}

template <typename A>
CenterGradients backward_as(const Tensor& grad, const Optional& grad_count, const Optional& grad_soft,
                            const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& pooled,
                            const Tensor& index, const Tensor& count, CenterParams<A> p, bool need_queries,
                            bool need_keys, bool need_values, bool shared) {
  const OnDevice device(queries);
  std::vector<Tensor> kept;
  auto gradients = center_gradients(p, kept, grad, grad_count, grad_soft, queries, keys, values, pooled, index, count,
                                    need_queries, need_keys, need_values, shared);
  if (p.B == 0 || p.L == 0) {
    torch::stable::zero_(std::get<0>(gradients)), torch::stable::zero_(std::get<3>(gradients));
    return gradients;
  }
  const Tensor memory = workspace_of(queries, center_workspace(p, true));
  check_launch("center_assignment_backward", center_backward<A>({p, data<unsigned char>(memory), device.stream()}));
  return gradients;
}

CenterGradients backward(Tensor grad, Optional grad_count, Optional grad_soft, Tensor queries, Tensor keys,
                         Tensor values, Optional center_bias, Optional key_scale, Optional mask, Optional noise,
                         Optional rng, Tensor pooled, Tensor index, Tensor count, double scale, double tau, bool hard,
                         int64_t normalizer, bool need_queries, bool need_keys, bool need_values, bool shared) {
  return with_center_params(queries, keys, values, center_bias, key_scale, mask, noise, rng, scale, tau, hard,
                            normalizer, [&](const auto& p) {
                              return backward_as(grad, grad_count, grad_soft, queries, keys, values, pooled, index,
                                                 count, p, need_queries, need_keys, need_values, shared);
                            });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("center_assignment", TORCH_BOX(&forward));
  m.impl("center_assignment_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
