// center_assignment on CUDA, sm_80 and newer: the memory plan, and the way to the code of each kind of arithmetic.
// Kernels and launches: _launch.cuh.
//
// Tokens lie on the rows of a tile, centers on its columns. Scores of 64 tokens with all centers meet in shared memory,
// where one thread a token draws the noise, finds the winner and the softmax. Pooling walks the tokens in order, each
// channel in one thread, so that every sum has a fixed order and keys and values are read once. Scores, noise, softmax
// and counts are float whatever the inputs: products of 16-bit operands are exact in float sums. Equation numbers:
// ovseg_kernels/ops/center_assignment.py.
#include "../common/device_workspace.h"
#include "center_assignment_cuda.h"

namespace ovseg {

template <typename A>
CenterBuffers<A> center_buffers(const CenterParams<A>& p, bool backward, unsigned char* workspace) {
  DeviceWorkspace memory(workspace);
  CenterBuffers<A> buffers{};
  if (backward || !p.hard) buffers.weights = memory.take<A>(p.B * p.L * p.G);
  if (!backward) buffers.spoiled = memory.take<int32_t>(p.B * center_flags(p.L));
  if (backward) {
    buffers.d_scores = memory.take<A>(p.B * p.L * p.G);
    buffers.scaled = memory.take<A>(p.B * p.G * p.E);
    buffers.rho = memory.take<A>(p.B * p.G);
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
template CenterBuffers<float> center_buffers(const CenterParams<float>&, bool, unsigned char*);
template CenterBuffers<double> center_buffers(const CenterParams<double>&, bool, unsigned char*);
template size_t center_workspace(const CenterParams<float>&, bool);
template size_t center_workspace(const CenterParams<double>&, bool);

}  // namespace ovseg
