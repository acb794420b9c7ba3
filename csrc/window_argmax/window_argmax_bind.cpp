// window_argmax: registration for the CPU.
#include "window_argmax_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
LabelOutputs run_as(WindowInputs<A> in, int64_t type, bool want_value) {
  const WindowTable<A>& table = OVSEG_BEST_ISA(window_table<A>());
  LabelOutputs found = in.outputs(type, want_value);
  const int64_t size = table.workspace_size(in.p);
  const int64_t count = ((in.p.H + kPrunedTile - 1) / kPrunedTile) * ((in.p.W + kPrunedTile - 1) / kPrunedTile);
  parallel_with_workspace<A>(in.values, count, size, in.values.scalar_type(),
                             [&](int64_t begin, int64_t end, A* memory) { table.tiles(in.p, begin, end, memory); });
  return found;
}

LabelOutputs run(Tensor values, Optional index, Tensor origins, Optional bias, Optional labels, int64_t hc, int64_t wc,
                 int64_t Hc, int64_t Wc, int64_t H, int64_t W, int64_t activation, int64_t stage,
                 std::optional<double> threshold, int64_t background, int64_t type, bool want_value) {
  return with_window_inputs([](const auto& in, int64_t t, bool v) { return run_as(in, t, v); }, values, index, origins,
                            bias, labels, {hc, wc, Hc, Wc, H, W, activation, stage}, threshold, background, type,
                            want_value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) { m.impl("window_argmax", TORCH_BOX(&run)); }

}  // namespace ovseg
