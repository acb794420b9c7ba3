// window_argmax: what the bind files of all devices share: checks, parameters and shapes of the outputs.
#pragma once
#include "../common/label_tensors.h"
#include "window_argmax.h"

namespace ovseg {

struct WindowSizes {
  int64_t hc, wc, Hc, Wc, H, W, activation, stage;
};

template <typename A>
struct WindowInputs {
  Tensor values, origins;
  Optional index;
  LabelTensors<A> rule;
  WindowParams<A> p{};

  WindowInputs(const Tensor& values_, const Optional& index_, const Tensor& origins_, const Optional& bias,
               const Optional& labels, const WindowSizes& s, std::optional<double> threshold, int64_t background)
      : values(torch::stable::contiguous(values_)),
        origins(torch::stable::contiguous(origins_)),
        index(contiguous(index_)),
        rule(bias, labels) {
    const int64_t rank = index ? 3 : 4;
    STD_TORCH_CHECK(values.dim() == rank, "values has ", values.dim(), " dimensions; expected ", rank);
    STD_TORCH_CHECK(values.numel() > 0, "values has no window, no class or no sample");
    STD_TORCH_CHECK(s.hc > 0 && s.wc > 0 && s.Hc >= s.hc && s.Wc >= s.wc, "the crop is ", s.hc, " x ", s.wc,
                    " and the canvas ", s.Hc, " x ", s.Wc, "; expected a crop inside the canvas");
    STD_TORCH_CHECK(s.activation >= 0 && s.activation <= 2 && s.stage >= 0 && s.stage <= 2,
                    "activation or stage is unknown");
    p.n = values.size(0), p.hc = s.hc, p.wc = s.wc, p.Hc = s.Hc, p.Wc = s.Wc;
    p.activation = static_cast<Activation>(s.activation), p.stage = static_cast<Stage>(s.stage);
    if (index) {
      p.G = values.size(1), p.C = values.size(2);
      check_shape("index", *index, {p.n, p.hc, p.wc}), check_type("index", *index, ScalarType::Short);
      p.index = data<int16_t>(*index);
    } else {
      p.C = values.size(1), p.h = values.size(2), p.w = values.size(3);
    }
    check_shape("origins", origins, {p.n, 2}), check_type("origins", origins, ScalarType::Long);
    p.values = data<A>(values), p.origins = data<int64_t>(origins);
    rule.fill(p, values, p.C, s.H, s.W, threshold, background);
  }

  LabelOutputs outputs(int64_t type, bool want_value) { return label_outputs(p, values, {p.H, p.W}, type, want_value); }
};

// run(inputs, type, want_value) in the type of the values, which Python has made float32 or float64; the schema's
// arguments in their order.
template <typename Run>
LabelOutputs with_window_inputs(const Run& run, const Tensor& values, const Optional& index, const Tensor& origins,
                                const Optional& bias, const Optional& labels, const WindowSizes& sizes,
                                std::optional<double> threshold, int64_t background, int64_t type, bool want_value) {
  if (values.scalar_type() == ScalarType::Double) {
    return run(WindowInputs<double>(values, index, origins, bias, labels, sizes, threshold, background), type,
               want_value);
  }
  check_type("values", values, ScalarType::Float);
  return run(WindowInputs<float>(values, index, origins, bias, labels, sizes, threshold, background), type, want_value);
}

}  // namespace ovseg
