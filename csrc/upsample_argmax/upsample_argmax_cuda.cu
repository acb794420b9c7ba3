// upsample_argmax on CUDA: a block owns the pixels of one cell. It finds the classes that can win there, (4), and
// interpolates only those. Equation numbers: ovseg_kernels/ops/upsample_argmax.py.
#include "../common/candidates.cuh"
#include "upsample_argmax_cuda.h"

namespace ovseg {
namespace {

template <typename A>
__global__ void __launch_bounds__(kPruningThreads) upsample_argmax_fwd_kernel(UpsampleParams<A> p) {
  OVSEG_DYNAMIC_SHARED(memory);
  const int64_t x = blockIdx.x, y = blockIdx.y, b = blockIdx.z;
  const int64_t X0 = first_output<A>(x, p.w, p.W), X1 = first_output<A>(x + 1, p.w, p.W);
  const int64_t Y0 = first_output<A>(y, p.h, p.H), Y1 = first_output<A>(y + 1, p.h, p.H);
  if (X0 >= X1 || Y0 >= Y1) return;  // of the whole block
  const int64_t right = x + 1 < p.w ? x + 1 : x, below = y + 1 < p.h ? y + 1 : y;
  const A* image = p.logits + b * p.C * p.h * p.w;
  auto corner = [&](int64_t c, int64_t row, int64_t column) { return image[(c * p.h + row) * p.w + column]; };
  auto bounds = [&](int64_t c, A& least, A& most) {
    const A add = p.bias ? p.bias[c] : A(0);
    const A corners[4] = {corner(c, y, x), corner(c, y, right), corner(c, below, x), corner(c, below, right)};
    least = fmin(fmin(corners[0], corners[1]), fmin(corners[2], corners[3])) + add;
    most = fmax(fmax(corners[0], corners[1]), fmax(corners[2], corners[3])) + add;
  };
  const Candidates<A> found = find_candidates<A>(p.C, memory, bounds);
  for (int64_t i = threadIdx.x; i < (X1 - X0) * (Y1 - Y0); i += kPruningThreads) {
    const int64_t Y = Y0 + i / (X1 - X0), X = X0 + i % (X1 - X0);
    const Between<A> v = between<A>(Y, p.h, p.H), u = between<A>(X, p.w, p.W);
    A best = minus_infinity<A>();
    int64_t winner = found.list[0];
    for (int32_t k = 0; k < found.count; ++k) {
      const int64_t c = found.list[k];
      const A left = weighted(v.to_low, corner(c, y, x)) + weighted(v.to_high, corner(c, below, x));
      const A other = weighted(v.to_low, corner(c, y, right)) + weighted(v.to_high, corner(c, below, right));
      const A value = weighted(u.to_low, left) + weighted(u.to_high, other) + (p.bias ? p.bias[c] : A(0));
      if (k == 0 || value > best) best = value, winner = c;
    }
    put_label(p, (b * p.H + Y) * p.W + X, winner, best);
  }
}

}  // namespace

template <typename A>
const char* upsample_argmax_on_device(const UpsampleParams<A>& p, void* stream) {
  const size_t shared = candidates_bytes<A>(p.C);
  if (shared > 96 * 1024) return "more than 23000 classes; use OVSEG_BACKEND=reference";
  if (p.h > 65535 || p.B > 65535) return "more than 65535 rows of samples or images; use OVSEG_BACKEND=reference";
  if (p.B == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.w), static_cast<unsigned>(p.h), static_cast<unsigned>(p.B));
  return OVSEG_LAUNCH(upsample_argmax_fwd_kernel<A>, grid, kPruningThreads, shared, stream, p);
}

template const char* upsample_argmax_on_device(const UpsampleParams<float>&, void*);
template const char* upsample_argmax_on_device(const UpsampleParams<double>&, void*);

}  // namespace ovseg
