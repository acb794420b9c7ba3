// patch_entropy on the CPU. Compiled once per instruction set. A task owns whole images.
#include "../common/simd.h"
#include "patch_entropy.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

template <typename A>
struct Softmax {
  A top = 0, total = 0, entropy = 0;  // p_n = exp(scores_n - top) / total

  Softmax(const A* scores, int64_t N) : top(scores[0]) {
    for (int64_t n = 1; n < N; ++n) top = scores[n] > top ? scores[n] : top;
    A weighted = 0;  // sum of exp(z) z, with z = scores - top
    for (int64_t n = 0; n < N; ++n) {
      const A z = scores[n] - top;
      total += exp_fast(z), weighted += exp_fast(z) * z;
    }
    entropy = log_of(total) - weighted / total;  // (1), of which nothing cancels: z is never positive
  }
};

template <typename A>
void forward(const PatchEntropyParams<A>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) p.entropy[b] = Softmax<A>(p.scores + b * p.N, p.N).entropy;
}

template <typename A>
void backward(const PatchEntropyParams<A>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const A* scores = p.scores + b * p.N;
    const Softmax<A> softmax(scores, p.N);
    for (int64_t n = 0; n < p.N; ++n) {
      const A z = scores[n] - softmax.top, log_p = z - log_of(softmax.total);
      p.grad_scores[b * p.N + n] = -p.grad[b] * exp_fast(z) / softmax.total * (log_p + softmax.entropy);  // (2)
    }
  }
}

}  // namespace

template <typename A>
const PatchEntropyTable<A>& patch_entropy_table() {
  static const PatchEntropyTable<A> table{forward<A>, backward<A>};
  return table;
}
template const PatchEntropyTable<float>& patch_entropy_table<float>();
template const PatchEntropyTable<double>& patch_entropy_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
