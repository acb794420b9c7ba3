// dense_contrastive_loss: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include <tuple>

#include "../common/tensors.h"
#include "dense_contrastive_loss.h"

namespace ovseg {

using Optional = std::optional<Tensor>;
using DensePair = std::tuple<Tensor, Tensor>;

// Owns what the parameters point to.
template <typename A>
struct DenseInputs {
  Tensor pixels, texts;
  std::vector<Tensor> kept;
  DenseParams<A> p{};

  DenseInputs(const Tensor& pixels_, const Tensor& texts_) : pixels(pixels_), texts(torch::stable::contiguous(texts_)) {
    STD_TORCH_CHECK(pixels.dim() == 3, "pixels has ", pixels.dim(), " dimensions; expected 3, [B, N, D]");
    STD_TORCH_CHECK(texts.dim() == 2, "texts has ", texts.dim(), " dimensions; expected 2, [T, D]");
    STD_TORCH_CHECK(is_floating(pixels), "pixels must be float32, float64, float16 or bfloat16");
    p.B = pixels.size(0), p.N = pixels.size(1), p.D = pixels.size(2), p.T = texts.size(0);
    check_shape("texts", texts, {p.T, p.D}), check_type("texts", texts, accumulation_type(pixels));
    p.type = type_code(pixels), p.pixels = pixels.const_data_ptr(), p.texts = data<A>(texts);
    for (int i = 0; i < 3; ++i) p.strides[i] = pixels.stride(i);
  }

  template <typename X>
  X* keep(const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType type) {
    check_shape(name, x, shape), check_type(name, x, type);
    kept.push_back(torch::stable::contiguous(x));
    return data<X>(kept.back());
  }

  void enter_selection(const Optional& image_ids, const Optional& text_ids, const Optional& rng, int64_t k_pos,
                       int64_t k_neg, int64_t skip, int64_t sampling, double temperature, double margin) {
    STD_TORCH_CHECK(image_ids.has_value() == text_ids.has_value(), "image_ids and text_ids go together");
    if (image_ids) {
      p.image_ids = keep<int64_t>("image_ids", *image_ids, {p.B}, ScalarType::Long);
      p.text_ids = keep<int64_t>("text_ids", *text_ids, {p.T}, ScalarType::Long);
    }
    STD_TORCH_CHECK(k_pos > 0 && k_neg > 0 && skip >= 0, "k_pos, k_neg and skip are ", k_pos, ", ", k_neg, ", ", skip);
    STD_TORCH_CHECK(sampling >= 0 && sampling <= 3, "sampling is ", sampling, "; expected 0 to 3");
    STD_TORCH_CHECK(sampling < 2 || rng, "this sampling needs rng");
    if (rng) p.rng = keep<int64_t>("rng", *rng, {2}, ScalarType::Long);
    skip = std::min(skip, p.B * p.N);  // more leaves nothing as well, and the lists hold k_neg + skip
    p.k_pos = k_pos, p.k_neg = k_neg, p.skip = skip, p.sampling = static_cast<Sampling>(sampling);
    p.inverse_temperature = static_cast<A>(1 / temperature), p.margin = static_cast<A>(margin);
  }

  DensePair selected() {
    Tensor positive = new_tensor(pixels, {p.T, p.k_pos}, ScalarType::Long);
    Tensor negative = new_tensor(pixels, {p.T, p.k_neg}, ScalarType::Long);
    p.positive = data<int64_t>(positive), p.negative = data<int64_t>(negative);
    return {positive, negative};
  }

  void enter_index(const Tensor& index, int64_t rows) {
    STD_TORCH_CHECK(index.dim() == 2, "index has ", index.dim(), " dimensions; expected 2, [T, K]");
    p.K = index.size(1), p.rows = rows;
    STD_TORCH_CHECK(rows >= 0 && rows <= p.K, "rows is ", rows, "; expected 0 to ", p.K);
    p.index = keep<int64_t>("index", index, {p.T, p.K}, ScalarType::Long);
  }

  void enter_gradients(const Optional& similarity, const Optional& unit, const Tensor& order) {
    const ScalarType type = accumulation_type(pixels);
    if (similarity) p.grad_similarity = keep<A>("grad_similarity", *similarity, {p.T, p.K}, type);
    if (unit) p.grad_unit = keep<A>("grad_unit", *unit, {p.T, p.rows, p.D}, type);
    p.order = keep<int64_t>("order", order, {p.T * p.K}, ScalarType::Long);
  }

  DensePair gathered() {
    const ScalarType type = accumulation_type(pixels);
    Tensor similarity = new_tensor(pixels, {p.T, p.K}, type), unit = new_tensor(pixels, {p.T, p.rows, p.D}, type);
    p.similarity = data<A>(similarity), p.unit = data<A>(unit);
    return {similarity, unit};
  }

  DensePair gradients(bool need_pixels, bool need_texts) {
    Tensor d_pixels = new_tensor(pixels, {need_pixels ? p.B : 0, p.N, p.D}, pixels.scalar_type());
    Tensor d_texts = new_tensor(pixels, {need_texts ? p.T : 0, p.D}, accumulation_type(pixels));
    p.grad_pixels = need_pixels ? d_pixels.mutable_data_ptr() : nullptr;
    p.grad_texts = need_texts ? data<A>(d_texts) : nullptr;
    torch::stable::zero_(d_pixels);
    return {d_pixels, d_texts};
  }
};

// run(inputs) with the accumulation type of the pixels.
template <typename Run>
auto with_dense_inputs(const Tensor& pixels, const Tensor& texts, const Run& run) {
  if (pixels.scalar_type() == ScalarType::Double) return run(DenseInputs<double>(pixels, texts));
  return run(DenseInputs<float>(pixels, texts));
}

}  // namespace ovseg
