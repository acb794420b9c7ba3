// contrastive_loss: registration for the CPU.
#include "contrastive_loss_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
const ContrastiveTable<A>& table() {
  return OVSEG_BEST_ISA(contrastive_table<A>());
}

template <typename A>
ContrastiveStats stats_as(ContrastiveInputs<A> in) {
  const ContrastiveTable<A>& run = table<A>();
  ContrastiveStats outputs = in.outputs();
  ContrastiveParams<A>& p = in.p;
  p.scale = *data<A>(in.scale), p.bias = *data<A>(in.bias);
  torch::stable::zero_(std::get<0>(outputs)), torch::stable::zero_(std::get<1>(outputs));
  if (p.B == 0 || p.T == 0) {  // a log-sum-exp over nothing
    for (int64_t i = 0; !p.sigmoid && i < p.B; ++i) p.rows[i] = -std::numeric_limits<A>::infinity();
    for (int64_t j = 0; !p.sigmoid && j < p.T; ++j) p.columns[j] = -std::numeric_limits<A>::infinity();
    return outputs;
  }
  const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
  const ScalarType type = in.image.scalar_type();
  Tensor packed = new_tensor(in.image, {run.packed_size(p)}, type);
  Tensor partial = new_tensor(in.image, {4 * plan.tasks * plan.rows}, type);
  Tensor state = new_tensor(in.image, {2 * p.T}, type);
  A *texts = data<A>(packed), *rows = data<A>(partial), *columns = data<A>(state);
  for (int64_t j = 0; j < p.T; ++j) columns[j] = -std::numeric_limits<A>::infinity(), columns[p.T + j] = 0;
  torch::stable::parallel_for(0, plan.tasks, 1,
                              [&](int64_t begin, int64_t end) { run.pack_columns(p, begin, end, texts); });
  for (int64_t first = 0; first < p.B; first += plan.rows) {
    const int64_t count = std::min(plan.rows, p.B - first);
    parallel_with_workspace<A>(in.image, plan.tasks, run.workspace_size(p), type,
                               [&](int64_t begin, int64_t end, A* workspace) {
                                 run.stats(p, first, count, begin, end, texts, rows, columns, workspace);
                               });
    run.finish_rows(p, first, count, rows);
  }
  run.finish_columns(p, columns);
  return outputs;
}

void check_unit_vectors(bool normalize) {
  STD_TORCH_CHECK(!normalize, "normalize is True; expected unit vectors: the CPU's kernels normalise nothing");
}

ContrastiveStats stats(Tensor image, Tensor text, Tensor scale, Tensor bias, Optional image_ids, Optional text_ids,
                       Optional pair_weights, int64_t offset, bool sigmoid, bool, bool normalize) {
  check_unit_vectors(normalize);
  return with_contrastive_inputs(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid,
                                 [&](const auto& in) { return stats_as(in); });
}

template <typename A>
ContrastiveGradients backward_as(ContrastiveInputs<A> in, const Tensor& grad, bool need_image, bool need_text) {
  const ContrastiveTable<A>& run = table<A>();
  ContrastiveGradients found = in.gradients(need_image, need_text);
  ContrastiveParams<A>& p = in.p;
  p.scale = *data<A>(in.scale), p.bias = *data<A>(in.bias), p.grad = *data<A>(grad);
  double d_scale = 0, d_bias = 0;
  if (p.B == 0 || p.T == 0) {
    torch::stable::zero_(std::get<0>(found)), torch::stable::zero_(std::get<1>(found));
  } else {
    const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
    const ScalarType type = in.image.scalar_type();
    const int64_t chunks = (p.T + kContrastiveChunk - 1) / kContrastiveChunk, packed_size = run.packed_size(p);
    Tensor packed = new_tensor(in.image, {packed_size}, type);
    Tensor packed_chunks = new_tensor(in.image, {need_image ? packed_size : 0}, type);
    Tensor packed_rows = new_tensor(in.image, {need_text ? run.packed_rows_size(p) : 0}, type);
    Tensor d_logits = new_tensor(in.image, {plan.rows * p.T}, type);
    Tensor sums = new_tensor(in.image, {plan.tasks * 2}, ScalarType::Double);
    A *columns = data<A>(packed), *texts = data<A>(packed_chunks), *images = data<A>(packed_rows);
    A* block = data<A>(d_logits);
    double* partial = data<double>(sums);
    auto parallel = [&](int64_t tasks, const auto& work) {
      parallel_with_workspace<A>(in.image, tasks, run.workspace_size(p), type, work);
    };
    torch::stable::parallel_for(0, plan.tasks, 1,
                                [&](int64_t begin, int64_t end) { run.pack_columns(p, begin, end, columns); });
    if (need_image) {
      torch::stable::parallel_for(0, chunks, 1,
                                  [&](int64_t begin, int64_t end) { run.pack_chunks(p, begin, end, texts); });
    }
    for (int64_t first = 0; first < p.B; first += plan.rows) {
      const int64_t count = std::min(plan.rows, p.B - first);
      parallel(plan.tasks, [&](int64_t begin, int64_t end, A* workspace) {
        run.logits(p, first, count, begin, end, columns, block, partial, workspace);
      });
      for (int64_t task = 0; task < plan.tasks; ++task) d_scale += partial[2 * task], d_bias += partial[2 * task + 1];
      if (need_image) {
        parallel(plan.slices, [&](int64_t begin, int64_t end, A* workspace) {
          run.image(p, first, count, begin, end, texts, block, workspace);
        });
      }
      if (need_text) {
        torch::stable::parallel_for(
            0, plan.slices, 1, [&](int64_t begin, int64_t end) { run.pack_rows(p, first, count, begin, end, images); });
        parallel(plan.tasks, [&](int64_t begin, int64_t end, A* workspace) {
          run.text(p, first, count, begin, end, images, block, workspace);
        });
      }
    }
  }
  *data<A>(std::get<2>(found)) = static_cast<A>(d_scale);
  *data<A>(std::get<3>(found)) = static_cast<A>(d_bias);
  return found;
}

ContrastiveGradients backward(Tensor grad, Tensor image, Tensor text, Tensor scale, Tensor bias, Optional image_ids,
                              Optional text_ids, Optional pair_weights, Tensor rows, Tensor columns, Tensor row_weight,
                              Tensor column_weight, int64_t offset, bool sigmoid, bool, bool normalize, bool need_image,
                              bool need_text) {
  check_unit_vectors(normalize);
  return with_contrastive_inputs(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid,
                                 [&](auto in) {
                                   in.enter_saved(grad, rows, columns, row_weight, column_weight);
                                   return backward_as(in, grad, need_image, need_text);
                                 });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("contrastive_stats", TORCH_BOX(&stats));
  m.impl("contrastive_loss_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
