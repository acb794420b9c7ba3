// contrastive_loss: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include <array>
#include <tuple>

#include "../common/tensors.h"
#include "contrastive_loss.h"

namespace ovseg {

using Optional = std::optional<Tensor>;
using ContrastiveStats = std::tuple<Tensor, Tensor>;
using ContrastiveGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Owns what the parameters point to. Features arrive as float32 or float64 (Python casts lower precision up).
template <typename A>
struct ContrastiveInputs {
  Tensor image, text, scale, bias;
  Optional image_ids, text_ids, pair_weights;
  std::array<Tensor, 4> saved;
  ContrastiveParams<A> p{};

  ContrastiveInputs(const Tensor& image_, const Tensor& text_, const Tensor& scale_, const Tensor& bias_,
                    const Optional& image_ids_, const Optional& text_ids_, const Optional& pair_weights_,
                    int64_t offset, bool sigmoid)
      : image(torch::stable::contiguous(image_)),
        text(torch::stable::contiguous(text_)),
        scale(scale_),
        bias(bias_),
        image_ids(contiguous(image_ids_)),
        text_ids(contiguous(text_ids_)),
        pair_weights(contiguous(pair_weights_)),
        saved{image, image, image, image} {
    STD_TORCH_CHECK(image.dim() == 2, "image has ", image.dim(), " dimensions; expected 2, [B, D]");
    STD_TORCH_CHECK(text.dim() == 2, "text has ", text.dim(), " dimensions; expected 2, [T, D]");
    p.B = image.size(0), p.T = text.size(0), p.D = image.size(1);
    check_shape("text", text, {p.T, p.D}), check_type("text", text, image.scalar_type());
    p.image = data<A>(image), p.text = data<A>(text);
    for (const Tensor& x : {scale, bias}) {
      STD_TORCH_CHECK(x.numel() == 1, "logit_scale or logit_bias has ", x.numel(), " elements; expected 1");
      check_type("logit_scale or logit_bias", x, image.scalar_type());
    }
    STD_TORCH_CHECK(image_ids.has_value() == text_ids.has_value(), "image_ids and text_ids go together");
    if (pair_weights) {
      STD_TORCH_CHECK(image_ids.has_value(), "pair_weights needs a list in place of image_ids and text_ids");
      STD_TORCH_CHECK(pair_weights->dim() == 2, "pair_weights has ", pair_weights->dim(), " dimensions; expected 2");
      p.pairs = pair_weights->size(1);
      check_shape("pair_weights", *pair_weights, {2, p.pairs});
      check_type("pair_weights", *pair_weights, image.scalar_type());
      p.listed = true, p.pair_weights = data<A>(*pair_weights);
    }
    if (image_ids) {
      const int64_t more = pair_weights ? 1 + p.pairs : 0;
      check_shape("image_ids", *image_ids, {p.B + more}), check_shape("text_ids", *text_ids, {p.T + more});
      check_type("image_ids", *image_ids, ScalarType::Long), check_type("text_ids", *text_ids, ScalarType::Long);
      p.image_ids = data<int64_t>(*image_ids), p.text_ids = data<int64_t>(*text_ids);
    }
    p.offset = offset, p.sigmoid = sigmoid;
  }
  static Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }

  ContrastiveStats outputs() {
    const ScalarType type = image.scalar_type();
    Tensor rows = new_tensor(image, {3, p.B}, type), columns = new_tensor(image, {3, p.T}, type);
    p.rows = data<A>(rows), p.columns = data<A>(columns);
    return {rows, columns};
  }

  void enter_saved(const Tensor& grad, const Tensor& rows, const Tensor& columns, const Tensor& row_weight,
                   const Tensor& column_weight) {
    check_shape("grad", grad, {}), check_shape("rows", rows, {3, p.B}), check_shape("columns", columns, {3, p.T});
    check_shape("row_weight", row_weight, {p.B}), check_shape("column_weight", column_weight, {p.T});
    check_type("grad", grad, image.scalar_type());
    saved = {torch::stable::contiguous(rows), torch::stable::contiguous(columns), torch::stable::contiguous(row_weight),
             torch::stable::contiguous(column_weight)};
    for (const Tensor& x : saved) check_type("a saved argument", x, image.scalar_type());
    p.rows = data<A>(saved[0]), p.columns = data<A>(saved[1]);
    p.row_weight = data<A>(saved[2]), p.column_weight = data<A>(saved[3]);
  }

  ContrastiveGradients gradients(bool need_image, bool need_text) {
    const ScalarType type = image.scalar_type();
    Tensor d_image = new_tensor(image, {need_image ? p.B : 0, p.D}, type);
    Tensor d_text = new_tensor(image, {need_text ? p.T : 0, p.D}, type);
    p.grad_image = need_image ? data<A>(d_image) : nullptr, p.grad_text = need_text ? data<A>(d_text) : nullptr;
    return {d_image, d_text, new_tensor(image, {}, type), new_tensor(image, {}, type)};
  }
};

// run(inputs) in the type of the features.
template <typename Run>
auto with_contrastive_inputs(const Tensor& image, const Tensor& text, const Tensor& scale, const Tensor& bias,
                             const Optional& image_ids, const Optional& text_ids, const Optional& pair_weights,
                             int64_t offset, bool sigmoid, const Run& run) {
  if (image.scalar_type() == ScalarType::Double) {
    return run(ContrastiveInputs<double>(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid));
  }
  check_type("image", image, ScalarType::Float);
  return run(ContrastiveInputs<float>(image, text, scale, bias, image_ids, text_ids, pair_weights, offset, sigmoid));
}

}  // namespace ovseg
