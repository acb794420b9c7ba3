// upsample_argmax: registration for CUDA.
#include "../common/cuda_tensors.h"
#include "upsample_argmax_bind.h"
#include "upsample_argmax_cuda.h"

namespace ovseg {
namespace {

LabelOutputs run_with(int32_t* flag, const Tensor& logits, const Optional& bias, const Optional& labels, int64_t H,
                      int64_t W, std::optional<double> threshold, int64_t background, int64_t type, bool want_value) {
  return with_upsample_inputs(logits, bias, labels, H, W, threshold, background, [&](auto in) {
    const OnDevice device(in.logits);
    LabelOutputs found = in.outputs(type, want_value);
    in.p.flag = flag;
    check_launch("upsample_argmax", upsample_argmax_on_device(in.p, device.stream()));
    return found;
  });
}

LabelOutputs run(Tensor logits, Optional bias, Optional labels, int64_t H, int64_t W, std::optional<double> threshold,
                 int64_t background, int64_t type, bool want_value) {
  return run_with(nullptr, logits, bias, labels, H, W, threshold, background, type, want_value);
}

LabelOutputs run_flagging(Tensor logits, Optional bias, Optional labels, int64_t H, int64_t W,
                          std::optional<double> threshold, int64_t background, int64_t type, bool want_value,
                          Tensor flags, int64_t slot) {
  return run_with(flag_at(flags, slot), logits, bias, labels, H, W, threshold, background, type, want_value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("upsample_argmax", TORCH_BOX(&run));
  m.impl("upsample_argmax_flagging", TORCH_BOX(&run_flagging));
}

}  // namespace ovseg
