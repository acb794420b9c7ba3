// center_assignment on CUDA, sm_80 and newer: the memory plan, and the way to the code of each kind of arithmetic.
// Launches: _launch.cuh.
//
// Up to eight centers (_few.cuh): one kernel a pass, in which every token is read once. More of them (_many.cuh):
// scores of 64 tokens with all centers meet in shared memory, where one thread a token draws the noise, finds the
// winner and the softmax, and pooling walks the tokens, each channel in one thread. Every sum has a fixed order.
// Scores, noise, softmax and counts are float whatever the inputs: products of 16-bit operands are exact in float sums.
// Equation numbers: ovseg_kernels/ops/center_assignment.py.
#include "../common/device_workspace.h"
#include "../common/tile.cuh"
#include "center_assignment_cuda.h"

namespace ovseg {

constexpr int64_t kFewBlocks = 264;  // two for each of 132 multiprocessors: fewer images are split

template <typename A>
FewPlan few_plan(const CenterParams<A>& p, bool backward) {
  const int64_t element = p.type == Type::float64 ? 8 : p.type == Type::float32 ? 4 : 2;
  const int64_t tokens = few_tokens(element), parts = element == 2 ? 8 : 1, width = p.D > p.E ? p.D : p.E;
  FewPlan plan{};
  plan.same = p.keys == p.values && p.D == p.E;
  for (int i = 0; i < 3; ++i) plan.same = plan.same && p.key_strides[i] == p.value_strides[i];
  const int64_t most = ceil_div(p.L, 64), wanted = ceil_div(kFewBlocks, p.B > 0 ? p.B : 1);
  const int64_t splits = most < wanted ? most : wanted;
  plan.tokens = static_cast<int>(round_up(p.L > 0 ? ceil_div(p.L, splits) : 1, 16));
  plan.splits = p.L > 0 ? static_cast<int>(ceil_div(p.L, plan.tokens)) : 1;
  // 16 or 32 bytes beyond a multiple of all banks: fragments load without conflicts.
  plan.pitch = static_cast<int>((round_up(width * element, 128) + 16) / element);
  plan.scaled_pitch = static_cast<int>((round_up(width * sizeof(A), 128) + 32) / sizeof(A));
  const int64_t rows = 2 * tokens + kFewCenters, pairs = tokens * kFewCenters;
  plan.bytes = rows * plan.pitch * element + (parts + 1) * 2 * pairs * sizeof(A) +
               (backward ? kFewCenters * (plan.scaled_pitch + 1) * sizeof(A) : 0);
  plan.fits = p.G <= kFewCenters && width <= kFewChannels && plan.bytes <= kBlockBytes && p.L < (1 << 30);
  return plan;
}

template <typename A>
CenterBuffers<A> center_buffers(const CenterParams<A>& p, bool backward, unsigned char* workspace) {
  DeviceWorkspace memory(workspace);
  CenterBuffers<A> buffers{};
  const FewPlan plan = few_plan(p, backward);
  if (plan.fits) {
    if (plan.splits > 1) {
      buffers.sums = memory.take<A>(p.B * plan.splits * p.G * (backward ? p.D : p.E));
      buffers.counts = memory.take<A>(p.B * plan.splits * p.G);
    }
  } else {
    if (backward || !p.hard) buffers.weights = memory.take<A>(p.B * p.L * p.G);
    if (!backward) buffers.spoiled = memory.take<int32_t>(p.B * center_flags(p.L));
    if (backward) {
      buffers.d_scores = memory.take<A>(p.B * p.L * p.G);
      buffers.scaled = memory.take<A>(p.B * p.G * p.E);
      buffers.rho = memory.take<A>(p.B * p.G);
    }
    if (!backward && pool_bytes<A>(p.G, 1) > kBlockBytes) {
      buffers.tallies = memory.take<A>(p.B * (p.E > 0 ? ceil_div(p.E, kPoolThreads) : 1) * 2 * p.G);
    }
    const size_t scores = (backward ? 2 : 1) * score_bytes<A>(p.G);
    if (kStageBytes + scores > kBlockBytes) {
      buffers.wide = memory.take<A>(p.B * ceil_div(p.L, kTile) * static_cast<int64_t>(scores / sizeof(A)));
    }
  }
  buffers.bytes = memory.bytes();
  return buffers;
}

template <typename A>
size_t center_workspace(const CenterParams<A>& p, bool backward) {
  return center_buffers(p, backward, nullptr).bytes;
}

#define OVSEG_DECLARE(kind, A)                               \
  const char* center_forward_##kind(const CenterCuda<A>& x); \
  const char* center_backward_##kind(const CenterCuda<A>& x);
OVSEG_DECLARE(Float64, double)
OVSEG_DECLARE(Float32, float)
OVSEG_DECLARE(Float16, float)
OVSEG_DECLARE(BFloat16, float)

template <>
const char* center_forward(const CenterCuda<double>& x) {
  return center_forward_Float64(x);
}
template <>
const char* center_backward(const CenterCuda<double>& x) {
  return center_backward_Float64(x);
}
template <>
const char* center_forward(const CenterCuda<float>& x) {
  if (x.p.type == Type::float16) return center_forward_Float16(x);
  return x.p.type == Type::bfloat16 ? center_forward_BFloat16(x) : center_forward_Float32(x);
}
template <>
const char* center_backward(const CenterCuda<float>& x) {
  if (x.p.type == Type::float16) return center_backward_Float16(x);
  return x.p.type == Type::bfloat16 ? center_backward_BFloat16(x) : center_backward_Float32(x);
}
template FewPlan few_plan(const CenterParams<float>&, bool);
template FewPlan few_plan(const CenterParams<double>&, bool);
template CenterBuffers<float> center_buffers(const CenterParams<float>&, bool, unsigned char*);
template CenterBuffers<double> center_buffers(const CenterParams<double>&, bool, unsigned char*);
template size_t center_workspace(const CenterParams<float>&, bool);
template size_t center_workspace(const CenterParams<double>&, bool);

}  // namespace ovseg
