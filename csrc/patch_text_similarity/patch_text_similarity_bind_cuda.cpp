// patch_text_similarity: from tensors to parameters, and registration for CUDA.
#include "../common/cuda_tensors.h"
#include "patch_text_similarity_bind.h"
#include "patch_text_similarity_cuda.h"

namespace ovseg {
namespace {

PatchTextCuda params(const Tensor& patches, const Tensor& texts, const std::optional<Tensor>& mask, const Tensor& scale,
                     const Tensor& bias, int64_t pool, int64_t weight, bool tf32, void* stream) {
  const ScalarType type = accumulation_type(patches);
  PatchTextCuda p{};
  p.B = patches.size(0), p.N = patches.size(1), p.D = patches.size(2), p.T = texts.size(0);
  p.pool = static_cast<Pool>(pool), p.weight = static_cast<Weight>(weight), p.type = type_code(patches), p.tf32 = tf32;
  p.patches = patches.const_data_ptr(), p.texts = texts.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.patch_strides[i] = patches.stride(i);
  for (int i = 0; i < 2; ++i) p.text_strides[i] = texts.stride(i);
  if (mask) {
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    for (int i = 0; i < 2; ++i) p.mask_strides[i] = mask->stride(i);
  }
  p.scale = device_scalar("scale", scale, type), p.bias = device_scalar("bias", bias, type);
  p.stream = stream;
  return p;
}

Tensor workspace(PatchTextCuda& p, const Tensor& like, bool backward) {
  const int64_t bytes = static_cast<int64_t>(patch_text_plan(p, backward).bytes);
  Tensor memory = new_tensor(like, {bytes}, ScalarType::Byte);
  p.workspace = data<unsigned char>(memory);
  return memory;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor patches, Tensor texts, std::optional<Tensor> patch_mask, Tensor scale,
                                           Tensor bias, int64_t pool, int64_t weight, bool tf32) {
  check_inputs(patches, texts, patch_mask, pool, weight);
  const OnDevice device(patches);
  auto outputs = allocate_forward(patches, texts, pool);
  auto& [similarity, lse, norm] = outputs;
  if (similarity.numel() == 0) return outputs;
  PatchTextCuda p = params(patches, texts, patch_mask, scale, bias, pool, weight, tf32, device.stream());
  p.similarity = similarity.mutable_data_ptr();
  p.lse = lse.numel() ? lse.mutable_data_ptr() : nullptr;
  p.norm = norm.numel() ? norm.mutable_data_ptr() : nullptr;
  const Tensor memory = workspace(p, patches, false);
  check_launch("patch_text_similarity", patch_text_forward(p));
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor patches, Tensor texts,
                                                    std::optional<Tensor> patch_mask, Tensor scale, Tensor bias,
                                                    Tensor similarity, Tensor lse, Tensor norm, int64_t pool,
                                                    int64_t weight, bool tf32, bool need_patches, bool need_texts) {
  check_backward(grad, patches, texts, patch_mask, similarity, lse, norm, pool, weight);
  const OnDevice device(patches);
  const ScalarType type = accumulation_type(patches), input_type = patches.scalar_type();
  const int64_t B = patches.size(0), N = patches.size(1), D = patches.size(2), T = texts.size(0);
  Tensor grad_patches = new_tensor(patches, {need_patches ? B : 0, N, D}, input_type);
  Tensor grad_texts = new_tensor(texts, {need_texts ? T : 0, D}, input_type);
  Tensor grad_scale = new_tensor(patches, {}, type), grad_bias = new_tensor(patches, {}, type);
  if (B == 0 || T == 0) {
    for (Tensor* x : {&grad_patches, &grad_texts, &grad_scale, &grad_bias}) torch::stable::zero_(*x);
    return {grad_patches, grad_texts, grad_scale, grad_bias};
  }
  PatchTextCuda p = params(patches, texts, patch_mask, scale, bias, pool, weight, tf32, device.stream());
  const Tensor dense_grad = torch::stable::contiguous(grad);
  p.grad = dense_grad.const_data_ptr();
  p.similarity = similarity.mutable_data_ptr();  // read only; so are the next two
  p.lse = lse.numel() ? lse.mutable_data_ptr() : nullptr;
  p.norm = norm.numel() ? norm.mutable_data_ptr() : nullptr;
  p.grad_patches = need_patches ? grad_patches.mutable_data_ptr() : nullptr;
  p.grad_texts = need_texts ? grad_texts.mutable_data_ptr() : nullptr;
  p.grad_scale = grad_scale.mutable_data_ptr(), p.grad_bias = grad_bias.mutable_data_ptr();
  const Tensor memory = workspace(p, patches, true);
  check_launch("patch_text_similarity_backward", patch_text_backward(p));
  return {grad_patches, grad_texts, grad_scale, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("patch_text_similarity", TORCH_BOX(&forward));
  m.impl("patch_text_similarity_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
