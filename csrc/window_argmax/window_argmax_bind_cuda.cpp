// window_argmax: registration for CUDA.
#include "../common/cuda_tensors.h"
#include "window_argmax_bind.h"
#include "window_argmax_cuda.h"

namespace ovseg {
namespace {

template <typename A>
LabelOutputs run_as(WindowInputs<A> in, int32_t* flag, int64_t type, bool want_value) {
  const OnDevice device(in.values);
  LabelOutputs found = in.outputs(type, want_value);
  in.p.flag = flag;
  Tensor norms = new_tensor(in.values, {window_norms(in.p)}, in.values.scalar_type());
  check_launch("window_argmax", window_argmax_on_device(in.p, data<A>(norms), device.stream()));
  return found;
}

LabelOutputs run(Tensor values, Optional index, Tensor origins, Optional bias, Optional labels, int64_t hc, int64_t wc,
                 int64_t Hc, int64_t Wc, int64_t H, int64_t W, int64_t activation, int64_t stage,
                 std::optional<double> threshold, int64_t background, int64_t type, bool want_value) {
  return with_window_inputs([](const auto& in, int64_t t, bool v) { return run_as(in, nullptr, t, v); }, values, index,
                            origins, bias, labels, {hc, wc, Hc, Wc, H, W, activation, stage}, threshold, background,
                            type, want_value);
}

LabelOutputs run_flagging(Tensor values, Optional index, Tensor origins, Optional bias, Optional labels, int64_t hc,
                          int64_t wc, int64_t Hc, int64_t Wc, int64_t H, int64_t W, int64_t activation, int64_t stage,
                          std::optional<double> threshold, int64_t background, int64_t type, bool want_value,
                          Tensor flags, int64_t slot) {
  int32_t* flag = flag_at(flags, slot);
  return with_window_inputs([flag](const auto& in, int64_t t, bool v) { return run_as(in, flag, t, v); }, values, index,
                            origins, bias, labels, {hc, wc, Hc, Wc, H, W, activation, stage}, threshold, background,
                            type, want_value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("window_argmax", TORCH_BOX(&run));
  m.impl("window_argmax_flagging", TORCH_BOX(&run_flagging));
}

}  // namespace ovseg
