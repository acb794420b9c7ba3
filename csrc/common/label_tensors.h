// What the bind files of the operators with label maps share: the rule of the labels and the two outputs.
#pragma once
#include <tuple>

#include "resize.h"
#include "tensors.h"

namespace ovseg {

using Optional = std::optional<Tensor>;
using LabelOutputs = std::tuple<Tensor, Tensor>;

inline Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : x; }

template <typename A>
struct LabelTensors {
  Optional bias, labels;

  LabelTensors(const Optional& bias_, const Optional& labels_) : bias(contiguous(bias_)), labels(contiguous(labels_)) {}

  void fill(LabelRule<A>& p, const Tensor& like, int64_t classes, int64_t H, int64_t W, std::optional<double> threshold,
            int64_t background) const {
    STD_TORCH_CHECK(H > 0 && W > 0, "size is ", H, " x ", W, "; expected at least 1 x 1");
    p.H = H, p.W = W;
    if (bias) {
      check_shape("bias", *bias, {classes}), check_type("bias", *bias, like.scalar_type());
      p.bias = data<A>(*bias);
    }
    if (labels) {
      check_shape("class_labels", *labels, {classes}), check_type("class_labels", *labels, ScalarType::Long);
      p.labels = data<int64_t>(*labels);
    }
    p.has_threshold = threshold.has_value(), p.threshold = static_cast<A>(threshold.value_or(0));
    p.background = background;
  }
};

// The flag that a kernel raises over numbers that are refused: one of those of the device.
inline int32_t* flag_at(const Tensor& flags, int64_t slot) {
  check_type("flags", flags, ScalarType::Int);
  STD_TORCH_CHECK(flags.dim() == 1 && 0 <= slot && slot < flags.numel(), "flags has ", flags.numel(),
                  " elements; expected one at ", slot);
  return data<int32_t>(flags) + slot * flags.stride(0);
}

// Labels of `shape`, and values of the same shape, or none in its first dimension.
template <typename A>
LabelOutputs label_outputs(LabelRule<A>& p, const Tensor& like, std::vector<int64_t> shape, int64_t type,
                           bool want_value) {
  STD_TORCH_CHECK(type >= 0 && type <= 2, "the type of the labels is ", type, "; expected 0 to 2");
  constexpr ScalarType kTypes[] = {ScalarType::Long, ScalarType::Short, ScalarType::Byte};
  Tensor out = new_tensor(like, shape, kTypes[type]);
  if (!want_value) shape[0] = 0;
  Tensor value = new_tensor(like, shape, like.scalar_type());
  p.type = static_cast<LabelType>(type), p.out = out.mutable_data_ptr();
  p.value = want_value ? data<A>(value) : nullptr;
  return {out, value};
}

}  // namespace ovseg
