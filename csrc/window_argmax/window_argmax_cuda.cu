// window_argmax on CUDA: a block owns a tile of outputs. It bounds every class by the samples that reach the tile, and
// computes (1) to (4) only for the classes that can win. With softmax a first kernel keeps, for each pixel of the
// stage, the largest value and the sum over the classes. Equation numbers: ovseg_kernels/ops/window_argmax.py.
#include "../common/candidates.cuh"
#include "window_argmax_cuda.h"

namespace ovseg {
namespace {

template <typename A>
struct Values {
  const WindowParams<A>& p;
  const A *top, *sum;  // of the softmax
  bool raw;            // without the activation, for the softmax itself

  __device__ A activated(Stage stage, A x, int64_t at) const {
    if (p.activation == Activation::none || p.stage != stage || raw) return x;
    if (p.activation == Activation::softmax) return exp(x - top[at]) / sum[at];
    return sigmoid(x);
  }
  __device__ static A sigmoid(A x) {
    const A e = exp(-fabs(x));
    return (x < A(0) ? e : A(1)) / (A(1) + e);
  }
  // (1) or (2) at a pixel of the crop.
  __device__ A window(int64_t k, int64_t c, int64_t v, int64_t u) const {
    const int64_t at = (k * p.hc + v) * p.wc + u;
    if (p.index) {
      const int64_t g = p.index[at], G = p.G - 1;
      return activated(Stage::window, p.values[(k * p.G + (g < 0 ? 0 : g < G ? g : G)) * p.C + c], at);
    }
    const Between<A> y = between<A>(v, p.h, p.hc), x = between<A>(u, p.w, p.wc);
    const A *above = p.values + ((k * p.C + c) * p.h + y.low) * p.w, *below = above + (y.high - y.low) * p.w;
    const A left = weighted(y.to_low, above[x.low]) + weighted(y.to_high, below[x.low]);
    const A right = weighted(y.to_low, above[x.high]) + weighted(y.to_high, below[x.high]);
    return activated(Stage::window, weighted(x.to_low, left) + weighted(x.to_high, right), at);
  }
  // (3) at a pixel of the canvas.
  __device__ A merged(int64_t c, int64_t v, int64_t u) const {
    A total = A(0), count = A(0);
    for (int64_t k = 0; k < p.n; ++k) {
      const int64_t y = v - p.origins[2 * k], x = u - p.origins[2 * k + 1];
      if (y < 0 || y >= p.hc || x < 0 || x >= p.wc) continue;
      total += window(k, c, y, x), count += A(1);
    }
    return activated(Stage::merged, count > A(0) ? total / count : A(0), v * p.Wc + u);
  }
  // (4) without the bias.
  __device__ A output(int64_t c, int64_t Y, int64_t X) const {
    const Between<A> y = between<A>(Y, p.Hc, p.H), x = between<A>(X, p.Wc, p.W);
    const A left = at_weight(y.to_low, c, y.low, x.low, x.to_low) + at_weight(y.to_high, c, y.high, x.low, x.to_low);
    const A right =
        at_weight(y.to_low, c, y.low, x.high, x.to_high) + at_weight(y.to_high, c, y.high, x.high, x.to_high);
    return activated(Stage::output, weighted(x.to_low, left) + weighted(x.to_high, right), Y * p.W + X);
  }
  __device__ A at_weight(A weight, int64_t c, int64_t v, int64_t u, A other) const {
    return weight == A(0) || other == A(0) ? A(0) : weight * merged(c, v, u);
  }
};

template <typename A>
__global__ void __launch_bounds__(kPruningThreads)
    window_argmax_norm_kernel(WindowParams<A> p, int64_t pixels, A* norms) {
  const Values<A> values{p, nullptr, nullptr, true};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPruningThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPruningThreads + threadIdx.x; at < pixels; at += stride) {
    A top = minus_infinity<A>(), sum = A(0);
    for (int64_t c = 0; c < p.C; ++c) {
      A x;
      if (p.stage == Stage::window) {
        x = values.window(at / (p.hc * p.wc), c, at / p.wc % p.hc, at % p.wc);
      } else if (p.stage == Stage::merged) {
        x = values.merged(c, at / p.Wc, at % p.Wc);
      } else {
        x = values.output(c, at / p.W, at % p.W);
      }
      const A next = larger(x, top);
      sum = sum * exp(top - next) + exp(x - next), top = next;
    }
    norms[at] = top, norms[pixels + at] = sum;
  }
}

template <typename A>
__global__ void __launch_bounds__(kPruningThreads)
    window_argmax_fwd_kernel(WindowParams<A> p, const A* norms, int64_t pixels) {
  OVSEG_DYNAMIC_SHARED(memory);
  unsigned char* present = memory + candidates_bytes<A>(p.C);  // [G]: groups that lie in the tile
  const Values<A> values{p, norms, norms + pixels, false};
  const int64_t Y0 = blockIdx.y * kPrunedTile, X0 = blockIdx.x * kPrunedTile;
  const int64_t Y1 = Y0 + kPrunedTile < p.H ? Y0 + kPrunedTile : p.H,
                X1 = X0 + kPrunedTile < p.W ? X0 + kPrunedTile : p.W;
  const int64_t v0 = between<A>(Y0, p.Hc, p.H).low, v1 = between<A>(Y1 - 1, p.Hc, p.H).high + 1;
  const int64_t u0 = between<A>(X0, p.Wc, p.W).low, u1 = between<A>(X1 - 1, p.Wc, p.W).high + 1;
  // f(window, rows and columns of its crop [y0, y1) x [x0, x1) that reach the tile) for each window that covers some of
  // it.
  auto each_window = [&](const auto& f) {
    for (int64_t k = 0; k < p.n; ++k) {
      const int64_t y = p.origins[2 * k], x = p.origins[2 * k + 1];
      if (y <= -p.hc || x <= -p.wc) continue;  // origins may be anything: v0 - y must not overflow
      const int64_t y0 = v0 > y ? v0 - y : 0, y1 = v1 - y < p.hc ? v1 - y : p.hc;
      const int64_t x0 = u0 > x ? u0 - x : 0, x1 = u1 - x < p.wc ? u1 - x : p.wc;
      if (y0 < y1 && x0 < x1) f(k, y0, y1, x0, x1);
    }
  };
  if (p.index) {
    for (int64_t g = threadIdx.x; g < p.G; g += kPruningThreads) present[g] = 0;
    __syncthreads();
    each_window([&](int64_t k, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      for (int64_t i = threadIdx.x; i < (y1 - y0) * (x1 - x0); i += kPruningThreads) {
        const int64_t g = p.index[(k * p.hc + y0 + i / (x1 - x0)) * p.wc + x0 + i % (x1 - x0)], G = p.G - 1;
        present[g < 0 ? 0 : g < G ? g : G] = 1;
      }
    });
    __syncthreads();
  }
  const bool sigmoids = p.activation == Activation::sigmoid;
  // Softmax of the outputs without a bias leaves their order alone; in all other places its sums differ from pixel to
  // pixel, and every class is computed.
  const bool bounded = p.activation != Activation::softmax || (p.stage == Stage::output && !p.bias);
  auto bounds = [&](int64_t c, A& least, A& most) {
    A low = static_cast<A>(INFINITY), high = minus_infinity<A>();  // a mean lies between its least and its largest part
    each_window([&](int64_t k, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      if (p.index) {
        for (int64_t g = 0; g < p.G; ++g) {
          const A x = p.values[(k * p.G + g) * p.C + c];
          if (present[g]) low = fmin(low, x), high = fmax(high, x);
        }
        return;
      }
      const int64_t r0 = between<A>(y0, p.h, p.hc).low, r1 = between<A>(y1 - 1, p.h, p.hc).high;
      const int64_t s0 = between<A>(x0, p.w, p.wc).low, s1 = between<A>(x1 - 1, p.w, p.wc).high;
      for (int64_t r = r0; r <= r1; ++r) {
        for (int64_t s = s0; s <= s1; ++s) {
          const A x = p.values[((k * p.C + c) * p.h + r) * p.w + s];
          low = fmin(low, x), high = fmax(high, x);
        }
      }
    });
    const A add = p.bias ? p.bias[c] : A(0);
    least = bounded ? (sigmoids ? Values<A>::sigmoid(low) : low) + add : minus_infinity<A>();
    most = bounded ? (sigmoids ? Values<A>::sigmoid(high) : high) + add : static_cast<A>(INFINITY);
  };
  const Candidates<A> found = find_candidates<A>(p.C, memory, bounds);
  for (int64_t i = threadIdx.x; i < (X1 - X0) * (Y1 - Y0); i += kPruningThreads) {
    const int64_t Y = Y0 + i / (X1 - X0), X = X0 + i % (X1 - X0);
    A best = minus_infinity<A>();
    int64_t winner = found.list[0];
    for (int32_t k = 0; k < found.count && (found.count > 1 || p.value || p.has_threshold); ++k) {
      const A value = values.output(found.list[k], Y, X) + (p.bias ? p.bias[found.list[k]] : A(0));
      if (value > best) best = value, winner = found.list[k];
    }
    put_label(p, Y * p.W + X, winner, best);
  }
}

}  // namespace

template <typename A>
const char* window_argmax_on_device(const WindowParams<A>& p, A* norms, void* stream) {
  const int64_t pixels = window_norms(p) / 2;
  const size_t shared = candidates_bytes<A>(p.C) + (p.index ? p.G : 0);
  if (shared > 96 * 1024) return "too many classes and groups for shared memory; use OVSEG_BACKEND=reference";
  const int64_t down = ceil_div(p.H, kPrunedTile), across = ceil_div(p.W, kPrunedTile);
  if (down > 65535) return "more than a million rows of labels; use OVSEG_BACKEND=reference";
  if (pixels) {
    const unsigned blocks = static_cast<unsigned>(pixels < (1 << 20) ? ceil_div(pixels, kPruningThreads) : 8192);
    OVSEG_TRY(OVSEG_LAUNCH(window_argmax_norm_kernel<A>, blocks, kPruningThreads, 0, stream, p, pixels, norms));
  }
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  return OVSEG_LAUNCH(window_argmax_fwd_kernel<A>, grid, kPruningThreads, shared, stream, p, norms, pixels);
}

template const char* window_argmax_on_device(const WindowParams<float>&, float*, void*);
template const char* window_argmax_on_device(const WindowParams<double>&, double*, void*);

}  // namespace ovseg
