// patch_text_similarity: from tensors to parameters, and registration for the CPU.
#include "patch_text_similarity_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
const PatchTextTable<A>& table() {
  return OVSEG_BEST_ISA(patch_text_table<A>());
}

// Rows must be contiguous; the outer dimensions may have any stride.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

struct Inputs {
  Tensor patches, texts;
  std::optional<Tensor> mask;

  Inputs(const Tensor& patches_, const Tensor& texts_, const std::optional<Tensor>& mask_)
      : patches(with_unit_stride(patches_)), texts(with_unit_stride(texts_)), mask(mask_) {}
};

template <typename A>
A scalar(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.numel() == 1, name, " has ", x.numel(), " elements; expected 1");
  if (x.scalar_type() == ScalarType::Double) return static_cast<A>(*data<double>(x));
  check_type(name, x, ScalarType::Float);
  return static_cast<A>(*data<float>(x));
}

template <typename A>
PatchTextParams<A> params(const Inputs& in, const Tensor& scale, const Tensor& bias, int64_t pool, int64_t weight) {
  PatchTextParams<A> p{};
  p.B = in.patches.size(0), p.N = in.patches.size(1), p.D = in.patches.size(2), p.T = in.texts.size(0);
  p.pool = static_cast<Pool>(pool), p.weight = static_cast<Weight>(weight), p.type = type_code(in.patches);
  p.patches = in.patches.const_data_ptr(), p.texts = in.texts.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.patch_strides[i] = in.patches.stride(i);
  p.text_strides[0] = in.texts.stride(0);
  if (in.mask) {
    p.mask = static_cast<const bool*>(in.mask->const_data_ptr());
    for (int i = 0; i < 2; ++i) p.mask_strides[i] = in.mask->stride(i);
  }
  p.scale = scalar<A>("scale", scale), p.bias = scalar<A>("bias", bias);
  return p;
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Inputs& in, const Tensor& scale, const Tensor& bias, int64_t pool,
                                              int64_t weight) {
  auto outputs = allocate_forward(in.patches, in.texts, pool);
  auto& [similarity, lse, norm] = outputs;
  if (similarity.numel() == 0) return outputs;
  const ScalarType type = similarity.scalar_type();
  PatchTextParams<A> p = params<A>(in, scale, bias, pool, weight);
  Tensor unit_texts = new_tensor(in.texts, {p.T, p.D}, type), text_norms = new_tensor(in.texts, {p.T}, type);
  p.similarity = data<A>(similarity), p.lse = data<A>(lse), p.norm = norm.numel() ? data<A>(norm) : nullptr;
  p.unit_texts = data<A>(unit_texts), p.text_norms = data<A>(text_norms);
  const PatchTextTable<A>& run = table<A>();
  run.prepare_texts(p);
  parallel_with_workspace<A>(in.patches, p.B, run.workspace_size(p), type,
                             [&](int64_t begin, int64_t end, A* memory) { run.forward_images(p, begin, end, memory); });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor patches, Tensor texts, std::optional<Tensor> patch_mask, Tensor scale,
                                           Tensor bias, int64_t pool, int64_t weight, bool /*tf32*/) {
  check_inputs(patches, texts, patch_mask, pool, weight);
  const Inputs in(patches, texts, patch_mask);
  return patches.scalar_type() == ScalarType::Double ? forward_as<double>(in, scale, bias, pool, weight)
                                                     : forward_as<float>(in, scale, bias, pool, weight);
}

// Partial sums of the text gradient: enough to keep many threads busy, within 64 MiB, a function of the shapes alone.
int64_t slot_count(int64_t B, int64_t T, int64_t D, int64_t element) {
  const int64_t room = (int64_t(64) << 20) / std::max<int64_t>(1, T * D * element);
  return std::max<int64_t>(1, std::min<int64_t>({B, 32, room}));
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as(const Tensor& grad, const Inputs& in, const Tensor& scale,
                                                       const Tensor& bias, const Tensor& similarity, const Tensor& lse,
                                                       const Tensor& norm, int64_t pool, int64_t weight,
                                                       bool need_patches, bool need_texts) {
  const ScalarType type = accumulation_type(in.patches), input_type = in.patches.scalar_type();
  const int64_t B = in.patches.size(0), N = in.patches.size(1), D = in.patches.size(2), T = in.texts.size(0);
  Tensor grad_patches = new_tensor(in.patches, {need_patches ? B : 0, N, D}, input_type);
  Tensor grad_texts = new_tensor(in.texts, {need_texts ? T : 0, D}, input_type);
  Tensor grad_scale = new_tensor(in.patches, {}, type), grad_bias = new_tensor(in.patches, {}, type);
  *data<A>(grad_scale) = *data<A>(grad_bias) = A(0);
  if (B == 0 || T == 0) {
    torch::stable::zero_(grad_patches), torch::stable::zero_(grad_texts);
    return {grad_patches, grad_texts, grad_scale, grad_bias};
  }
  PatchTextParams<A> p = params<A>(in, scale, bias, pool, weight);
  p.similarity = data<A>(similarity), p.lse = lse.numel() ? data<A>(lse) : nullptr;
  p.norm = norm.numel() ? data<A>(norm) : nullptr;
  const Tensor dense_grad = torch::stable::contiguous(grad);
  p.grad = data<A>(dense_grad);
  p.grad_patches = need_patches ? grad_patches.mutable_data_ptr() : nullptr;
  p.grad_texts = need_texts ? grad_texts.mutable_data_ptr() : nullptr;
  p.slots = slot_count(B, T, D, sizeof(A));

  const PatchTextTable<A>& run = table<A>();
  Tensor unit_texts = new_tensor(in.texts, {T, D}, type), text_norms = new_tensor(in.texts, {T}, type);
  Tensor packed = new_tensor(in.texts, {run.packed_texts_size(T, D)}, type);
  Tensor slot_texts = new_tensor(in.texts, {need_texts ? p.slots : 0, T, D}, type);
  Tensor slot_scalars = new_tensor(in.texts, {p.slots, 2}, ScalarType::Double);
  p.unit_texts = data<A>(unit_texts), p.text_norms = data<A>(text_norms), p.packed_texts = data<A>(packed);
  p.slot_texts = need_texts ? data<A>(slot_texts) : nullptr;
  p.slot_scalars = data<double>(slot_scalars);

  run.prepare_texts(p);
  parallel_with_workspace<A>(in.patches, p.slots, run.workspace_size(p), type,
                             [&](int64_t begin, int64_t end, A* memory) { run.backward_slots(p, begin, end, memory); });
  if (need_texts) {
    torch::stable::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) { run.finish_texts(p, begin, end); });
  }
  double sums[2] = {0, 0};
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    for (int i = 0; i < 2; ++i) sums[i] += p.slot_scalars[2 * slot + i];
  }
  *data<A>(grad_scale) = static_cast<A>(sums[0]), *data<A>(grad_bias) = static_cast<A>(sums[1]);
  return {grad_patches, grad_texts, grad_scale, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor patches, Tensor texts,
                                                    std::optional<Tensor> patch_mask, Tensor scale, Tensor bias,
                                                    Tensor similarity, Tensor lse, Tensor norm, int64_t pool,
                                                    int64_t weight, bool /*tf32*/, bool need_patches, bool need_texts) {
  check_backward(grad, patches, texts, patch_mask, similarity, lse, norm, pool, weight);
  const Inputs in(patches, texts, patch_mask);
  return patches.scalar_type() == ScalarType::Double
             ? backward_as<double>(grad, in, scale, bias, similarity, lse, norm, pool, weight, need_patches, need_texts)
             : backward_as<float>(grad, in, scale, bias, similarity, lse, norm, pool, weight, need_patches, need_texts);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("patch_text_similarity", TORCH_BOX(&forward));
  m.impl("patch_text_similarity_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
