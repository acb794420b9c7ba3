// center_assignment: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include <tuple>

#include "../common/tensors.h"
#include "center_assignment.h"

namespace ovseg {

using Optional = std::optional<Tensor>;
using CenterOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using CenterGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
CenterParams<A> center_params(const Tensor& queries, const Tensor& keys, const Tensor& values,
                              const Optional& center_bias, const Optional& key_scale, const Optional& mask,
                              const Optional& noise, const Optional& rng, double scale, double tau, bool hard,
                              int64_t normalizer) {
  STD_TORCH_CHECK(queries.dim() == 3, "queries has ", queries.dim(), " dimensions; expected 3, [B, G, D]");
  STD_TORCH_CHECK(keys.dim() == 3, "keys has ", keys.dim(), " dimensions; expected 3, [B, L, D]");
  STD_TORCH_CHECK(values.dim() == 3, "values has ", values.dim(), " dimensions; expected 3, [B, L, E]");
  STD_TORCH_CHECK(is_floating(queries), "queries must be float32, float64, float16 or bfloat16");
  CenterParams<A> p{};
  p.B = queries.size(0), p.G = queries.size(1), p.D = queries.size(2), p.L = keys.size(1), p.E = values.size(2);
  STD_TORCH_CHECK(p.G > 0 && p.D > 0, "queries has no center or no channel");
  check_shape("keys", keys, {p.B, p.L, p.D}), check_shape("values", values, {p.B, p.L, p.E});
  check_type("keys", keys, queries.scalar_type()), check_type("values", values, queries.scalar_type());
  p.type = type_code(queries);
  p.queries = queries.const_data_ptr(), p.keys = keys.const_data_ptr(), p.values = values.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    p.query_strides[i] = queries.stride(i), p.key_strides[i] = keys.stride(i), p.value_strides[i] = values.stride(i);
  }
  if (center_bias) {
    check_shape("center_bias", *center_bias, {p.B, p.G});
    check_type("center_bias", *center_bias, accumulation_type(queries));
    STD_TORCH_CHECK(center_bias->is_contiguous(), "center_bias must be contiguous");
    p.center_bias = data<A>(*center_bias), p.biased = true;
  }
  if (key_scale) {
    check_shape("key_scale", *key_scale, {p.B, p.L});
    check_type("key_scale", *key_scale, accumulation_type(queries));
    STD_TORCH_CHECK(key_scale->is_contiguous(), "key_scale must be contiguous");
    p.key_scale = data<A>(*key_scale), p.scaled = true;
  }
  if (mask) {
    check_shape("mask", *mask, {p.B, p.L}), check_type("mask", *mask, ScalarType::Bool);
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    for (int i = 0; i < 2; ++i) p.mask_strides[i] = mask->stride(i);
  }
  STD_TORCH_CHECK(!(noise && rng), "noise and rng were both given");
  if (noise) {
    check_shape("noise", *noise, {p.B, p.G, p.L}), check_type("noise", *noise, accumulation_type(queries));
    p.noise = data<A>(*noise);
    for (int i = 0; i < 3; ++i) p.noise_strides[i] = noise->stride(i);
  }
  if (rng) {
    check_shape("rng", *rng, {2}), check_type("rng", *rng, ScalarType::Long);
    STD_TORCH_CHECK(rng->is_contiguous(), "rng must be contiguous");
    p.rng = static_cast<const int64_t*>(rng->const_data_ptr());
  }
  STD_TORCH_CHECK(normalizer >= 0 && normalizer <= 2, "normalizer is ", normalizer, "; expected 0, 1 or 2");
  p.scale = static_cast<A>(scale), p.tau = static_cast<A>(tau), p.hard = hard;
  p.normalizer = static_cast<Normalizer>(normalizer);
  return p;
}

// run(parameters) with the accumulation type of the inputs.
template <typename Run>
auto with_center_params(const Tensor& queries, const Tensor& keys, const Tensor& values, const Optional& center_bias,
                        const Optional& key_scale, const Optional& mask, const Optional& noise, const Optional& rng,
                        double scale, double tau, bool hard, int64_t normalizer, const Run& run) {
  if (queries.scalar_type() == ScalarType::Double) {
    return run(center_params<double>(queries, keys, values, center_bias, key_scale, mask, noise, rng, scale, tau, hard,
                                     normalizer));
  }
  return run(center_params<float>(queries, keys, values, center_bias, key_scale, mask, noise, rng, scale, tau, hard,
                                  normalizer));
}

template <typename A>
CenterOutputs center_outputs(CenterParams<A>& p, const Tensor& like, bool want_soft) {
  const ScalarType type = accumulation_type(like);
  Tensor pooled = new_tensor(like, {p.B, p.G, p.E}, type), index = new_tensor(like, {p.B, p.L}, ScalarType::Long);
  Tensor count = new_tensor(like, {p.B, p.G}, type), soft = new_tensor(like, {want_soft ? p.B : 0, p.G, p.L}, type);
  p.pooled = data<A>(pooled), p.index = data<int64_t>(index), p.count = data<A>(count);
  p.soft = want_soft ? data<A>(soft) : nullptr;
  return {pooled, index, count, soft};
}

// What the backward reads, contiguous, and the gradients it writes; `kept` keeps the former alive.
template <typename A>
CenterGradients center_gradients(CenterParams<A>& p, std::vector<Tensor>& kept, const Tensor& grad,
                                 const Optional& grad_count, const Optional& grad_soft, const Tensor& queries,
                                 const Tensor& keys, const Tensor& values, const Tensor& pooled, const Tensor& index,
                                 const Tensor& count, bool need_queries, bool need_keys, bool need_values,
                                 bool shared) {
  const ScalarType type = accumulation_type(queries), input_type = queries.scalar_type();
  check_shape("grad", grad, {p.B, p.G, p.E}), check_type("grad", grad, type);
  check_shape("pooled", pooled, {p.B, p.G, p.E}), check_type("pooled", pooled, type);
  check_shape("index", index, {p.B, p.L}), check_type("index", index, ScalarType::Long);
  check_shape("count", count, {p.B, p.G}), check_type("count", count, type);
  for (const Tensor& x : {grad, pooled, index, count}) kept.push_back(torch::stable::contiguous(x));
  p.grad = data<A>(kept[0]), p.pooled = data<A>(kept[1]), p.index = data<int64_t>(kept[2]), p.count = data<A>(kept[3]);
  if (grad_soft) {
    check_shape("grad_soft", *grad_soft, {p.B, p.G, p.L}), check_type("grad_soft", *grad_soft, type);
    kept.push_back(torch::stable::contiguous(*grad_soft));
    p.grad_soft = data<A>(kept.back());
  }
  if (grad_count) {
    check_shape("grad_count", *grad_count, {p.B, p.G}), check_type("grad_count", *grad_count, type);
    kept.push_back(torch::stable::contiguous(*grad_count));
    p.grad_count = data<A>(kept.back());
  }
  Tensor d_queries = new_tensor(queries, {need_queries ? p.B : 0, p.G, p.D}, input_type);
  Tensor d_keys = new_tensor(keys, {need_keys ? p.B : 0, p.L, p.D}, input_type);
  Tensor d_values = new_tensor(values, {need_values ? p.B : 0, p.L, p.E}, input_type);
  p.grad_queries = need_queries ? d_queries.mutable_data_ptr() : nullptr;
  p.grad_keys = need_keys ? d_keys.mutable_data_ptr() : nullptr;
  STD_TORCH_CHECK(!shared || (p.D == p.E && !need_values),
                  "shared needs values that are the keys, and no gradient of their own");
  p.shared = shared;
  p.grad_values = need_values ? d_values.mutable_data_ptr() : nullptr;
  Tensor d_bias = new_tensor(queries, {p.biased ? p.B : 0, p.G}, type);
  Tensor d_scale = new_tensor(queries, {p.scaled ? p.B : 0, p.L}, type);
  p.grad_bias = p.biased ? data<A>(d_bias) : nullptr;
  p.grad_scale = p.scaled ? data<A>(d_scale) : nullptr;
  return {d_queries, d_keys, d_values, d_bias, d_scale};
}

}  // namespace ovseg
