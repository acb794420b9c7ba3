// patch_text_similarity: what the bind files of all devices share: checks, types and shapes of the outputs.
#pragma once
#include <tuple>

#include "../common/tensors.h"
#include "patch_text_similarity.h"

namespace ovseg {

inline void check_inputs(const Tensor& patches, const Tensor& texts, const std::optional<Tensor>& mask, int64_t pool,
                         int64_t weight) {
  STD_TORCH_CHECK(patches.dim() == 3, "patches has ", patches.dim(), " dimensions; expected 3, [B, N, D]");
  STD_TORCH_CHECK(is_floating(patches), "patches must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(patches.size(1) > 0 && patches.size(2) > 0, "patches has no patch or no channel");
  STD_TORCH_CHECK(texts.dim() == 2, "texts has ", texts.dim(), " dimensions; expected 2, [T, D]");
  check_shape("texts", texts, {texts.size(0), patches.size(2)});
  check_type("texts", texts, patches.scalar_type());
  if (mask) {
    check_shape("patch_mask", *mask, {patches.size(0), patches.size(1)});
    check_type("patch_mask", *mask, ScalarType::Bool);
  }
  STD_TORCH_CHECK(pool >= 0 && pool <= 2, "pool is ", pool, "; expected 0, 1 or 2");
  STD_TORCH_CHECK(weight >= 0 && weight <= 1, "weight is ", weight, "; expected 0 or 1");
}

inline std::tuple<Tensor, Tensor, Tensor> allocate_forward(const Tensor& patches, const Tensor& texts, int64_t pool) {
  const ScalarType type = accumulation_type(patches);
  const int64_t B = patches.size(0), T = texts.size(0);
  const int64_t lse = pool == static_cast<int64_t>(Pool::max) ? 0 : B;
  const int64_t norm = pool == static_cast<int64_t>(Pool::vector) ? B : 0;
  return {new_tensor(patches, {B, T}, type), new_tensor(patches, {lse, T}, type), new_tensor(patches, {norm, T}, type)};
}

inline void check_backward(const Tensor& grad, const Tensor& patches, const Tensor& texts,
                           const std::optional<Tensor>& patch_mask, const Tensor& similarity, const Tensor& lse,
                           const Tensor& norm, int64_t pool, int64_t weight) {
  check_inputs(patches, texts, patch_mask, pool, weight);
  const int64_t B = patches.size(0), T = texts.size(0);
  const bool is_max = pool == static_cast<int64_t>(Pool::max), is_vector = pool == static_cast<int64_t>(Pool::vector);
  check_shape("grad", grad, {B, T});
  check_shape("similarity", similarity, {B, T});
  check_shape("lse", lse, {is_max ? 0 : B, T});
  check_shape("norm", norm, {is_vector ? B : 0, T});
  for (const Tensor* x : {&grad, &similarity, &lse, &norm})
    check_type("a [B, T] argument", *x, accumulation_type(patches));
  for (const Tensor* x : {&similarity, &lse, &norm})
    STD_TORCH_CHECK(x->is_contiguous(), "similarity, lse and norm must be contiguous");
}

}  // namespace ovseg
