// upsample_argmax: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include <tuple>

#include "../common/tensors.h"
#include "upsample_argmax.h"

namespace ovseg {

using Optional = std::optional<Tensor>;
using UpsampleOutputs = std::tuple<Tensor, Tensor>;

template <typename A>
struct UpsampleInputs {
  Tensor logits;
  Optional bias, labels;
  UpsampleParams<A> p{};

  UpsampleInputs(const Tensor& logits_, const Optional& bias_, const Optional& labels_, int64_t H, int64_t W,
                 std::optional<double> threshold, int64_t background)
      : logits(torch::stable::contiguous(logits_)), bias(contiguous(bias_)), labels(contiguous(labels_)) {
    STD_TORCH_CHECK(logits.dim() == 4, "logits has ", logits.dim(), " dimensions; expected 4, [B, C, h, w]");
    p.B = logits.size(0), p.C = logits.size(1), p.h = logits.size(2), p.w = logits.size(3), p.H = H, p.W = W;
    STD_TORCH_CHECK(p.C > 0 && p.h > 0 && p.w > 0, "logits has no class or no sample");
    STD_TORCH_CHECK(H > 0 && W > 0, "size is ", H, " x ", W, "; expected at least 1 x 1");
    p.logits = data<A>(logits);
    if (bias) {
      check_shape("bias", *bias, {p.C}), check_type("bias", *bias, logits.scalar_type());
      p.bias = data<A>(*bias);
    }
    if (labels) {
      check_shape("class_labels", *labels, {p.C}), check_type("class_labels", *labels, ScalarType::Long);
      p.labels = data<int64_t>(*labels);
    }
    p.has_threshold = threshold.has_value(), p.threshold = static_cast<A>(threshold.value_or(0));
    p.background = background;
  }
  static Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }

  UpsampleOutputs outputs(int64_t type, bool want_value) {
    STD_TORCH_CHECK(type >= 0 && type <= 2, "the type of the labels is ", type, "; expected 0 to 2");
    constexpr ScalarType kTypes[] = {ScalarType::Long, ScalarType::Short, ScalarType::Byte};
    Tensor out = new_tensor(logits, {p.B, p.H, p.W}, kTypes[type]);
    Tensor value = new_tensor(logits, {want_value ? p.B : 0, p.H, p.W}, logits.scalar_type());
    p.type = static_cast<LabelType>(type), p.out = out.mutable_data_ptr();
    p.value = want_value ? data<A>(value) : nullptr;
    return {out, value};
  }
};

// run(inputs) in the type of the logits, which Python has made float32 or float64.
template <typename Run>
auto with_upsample_inputs(const Tensor& logits, const Optional& bias, const Optional& labels, int64_t H, int64_t W,
                          std::optional<double> threshold, int64_t background, const Run& run) {
  if (logits.scalar_type() == ScalarType::Double) {
    return run(UpsampleInputs<double>(logits, bias, labels, H, W, threshold, background));
  }
  check_type("logits", logits, ScalarType::Float);
  return run(UpsampleInputs<float>(logits, bias, labels, H, W, threshold, background));
}

}  // namespace ovseg
