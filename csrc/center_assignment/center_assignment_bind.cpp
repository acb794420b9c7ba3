// center_assignment: registration for the CPU.
#include "center_assignment_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
const CenterTable<A>& table() {
  return OVSEG_BEST_ISA(center_table<A>());
}

template <typename A>
CenterOutputs forward_as(const Tensor& like, CenterParams<A> p, bool want_soft) {
  CenterOutputs outputs = center_outputs(p, like, want_soft);
  const ScalarType type = accumulation_type(like);
  const CenterTable<A>& run = table<A>();
  const int64_t tasks = p.B * center_slots(p.L);
  Tensor memory = new_tensor(like, {tasks * p.G * (p.E + 1)}, type);
  A* partial = data<A>(memory);
  parallel_with_workspace<A>(like, tasks, run.workspace_size(p), type, [&](int64_t begin, int64_t end, A* workspace) {
    run.forward_slots(p, begin, end, partial, workspace);
  });
  torch::stable::parallel_for(0, p.B, 1,
                              [&](int64_t begin, int64_t end) { run.finish_forward(p, begin, end, partial); });
  return outputs;
}

CenterOutputs forward(Tensor queries, Tensor keys, Tensor values, Optional center_bias, Optional key_scale,
                      Optional mask, Optional noise, Optional rng, double scale, double tau, bool hard,
                      int64_t normalizer, bool want_soft) {
  return with_center_params(queries, keys, values, center_bias, key_scale, mask, noise, rng, scale, tau, hard,
                            normalizer, [&](const auto& p) { return forward_as(queries, p, want_soft); });
}

template <typename A>
CenterGradients run_backward(const Tensor& like, const CenterParams<A>& p, CenterGradients gradients) {
  const CenterTable<A>& run = table<A>();
  const ScalarType type = accumulation_type(like);
  const int64_t slots = center_slots(p.L), tasks = p.B * slots;
  if (p.L == 0) torch::stable::zero_(std::get<0>(gradients)), torch::stable::zero_(std::get<3>(gradients));
  const bool sums = p.grad_queries || p.grad_bias;
  Tensor memory = new_tensor(like, {sums ? tasks * p.G * (p.D + 1) : 0}, type);
  A* partial = data<A>(memory);
  parallel_with_workspace<A>(like, tasks, run.workspace_size(p), type, [&](int64_t begin, int64_t end, A* workspace) {
    run.backward_slots(p, begin, end, partial, workspace);
  });
  if (sums && slots > 0) {
    torch::stable::parallel_for(0, p.B, 1,
                                [&](int64_t begin, int64_t end) { run.finish_backward(p, begin, end, partial); });
  }
  return gradients;
}

template <typename A>
CenterGradients backward_as(const Tensor& grad, const Optional& grad_count, const Optional& grad_soft,
                            const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& pooled,
                            const Tensor& index, const Tensor& count, CenterParams<A> p, bool need_queries,
                            bool need_keys, bool need_values, bool shared) {
  std::vector<Tensor> kept;
  auto gradients = center_gradients(p, kept, grad, grad_count, grad_soft, queries, keys, values, pooled, index, count,
                                    need_queries, need_keys, need_values, shared);
  return run_backward(queries, p, gradients);
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

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("center_assignment", TORCH_BOX(&forward));
  m.impl("center_assignment_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
