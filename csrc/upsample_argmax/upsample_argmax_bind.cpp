// upsample_argmax: registration for the CPU.
#include "upsample_argmax_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
LabelOutputs run_as(UpsampleInputs<A> in, int64_t type, bool want_value) {
  const UpsampleTable<A>& table = OVSEG_BEST_ISA(upsample_table<A>());
  LabelOutputs found = in.outputs(type, want_value);
  const int64_t count = in.p.B * in.p.h, size = table.workspace_size(in.p);
  parallel_with_workspace<A>(in.logits, count, size, in.logits.scalar_type(),
                             [&](int64_t begin, int64_t end, A* memory) { table.rows(in.p, begin, end, memory); });
  return found;
}

LabelOutputs run(Tensor logits, Optional bias, Optional labels, int64_t H, int64_t W, std::optional<double> threshold,
                 int64_t background, int64_t type, bool want_value) {
  return with_upsample_inputs(logits, bias, labels, H, W, threshold, background,
                              [&](const auto& in) { return run_as(in, type, want_value); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&run)); }

}  // namespace ovseg
