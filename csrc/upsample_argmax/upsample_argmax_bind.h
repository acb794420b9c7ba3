// upsample_argmax: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include "../common/label_tensors.h"
#include "upsample_argmax.h"

namespace ovseg {

template <typename A>
struct UpsampleInputs {
  Tensor logits;
  LabelTensors<A> rule;
  UpsampleParams<A> p{};

  UpsampleInputs(const Tensor& logits_, const Optional& bias, const Optional& labels, int64_t H, int64_t W,
                 std::optional<double> threshold, int64_t background)
      : logits(torch::stable::contiguous(logits_)), rule(bias, labels) {
    STD_TORCH_CHECK(logits.dim() == 4, "logits has ", logits.dim(), " dimensions; expected 4, [B, C, h, w]");
    p.B = logits.size(0), p.C = logits.size(1), p.h = logits.size(2), p.w = logits.size(3);
    STD_TORCH_CHECK(p.C > 0 && p.h > 0 && p.w > 0, "logits has no class or no sample");
    p.logits = data<A>(logits);
    rule.fill(p, logits, p.C, H, W, threshold, background);
  }

  LabelOutputs outputs(int64_t type, bool want_value) {
    return label_outputs(p, logits, {p.B, p.H, p.W}, type, want_value);
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
