// upsample_mask_loss on the CPU. Compiled once per instruction set. A task owns a map: it upsamples it row by row into
// a buffer of one row, and sums (2) and (3), or sends (5) back through the transposed upsampling.
#include "../common/simd.h"
#include "../common/workspace.h"
#include "upsample_mask_loss.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

inline float power(float x, float y) { return __builtin_powf(x, y); }
inline double power(double x, double y) { return __builtin_pow(x, y); }

template <typename A>
struct Workspace {
  A *line, *x, *to_low, *to_high;  // a row of samples; a row of outputs, and its weights
  A *grad_low, *grad_high;         // [W]: gradients of outputs, gathered for the two rows of samples around
  A* column;                       // [5, W]: sums over the rows
  int32_t *low, *high;             // [W]
  int64_t size;

  Workspace(const MaskLossParams<A>& p, A* base) {
    Arena<A> arena(base);
    line = arena.template take<A>(p.w), x = arena.template take<A>(p.W);
    to_low = arena.template take<A>(p.W), to_high = arena.template take<A>(p.W);
    grad_low = arena.template take<A>(p.W), grad_high = arena.template take<A>(p.W);
    column = arena.template take<A>(5 * p.W);
    low = arena.template take<int32_t>(p.W), high = arena.template take<int32_t>(p.W);
    size = arena.size();
  }
  void columns(const MaskLossParams<A>& p) {
    for (int64_t X = 0; X < p.W; ++X) {
      const Between<A> at = between<A>(X, p.w, p.W);
      low[X] = static_cast<int32_t>(at.low), high[X] = static_cast<int32_t>(at.high);
      to_low[X] = at.to_low, to_high[X] = at.to_high;
    }
  }
};

template <typename A>
int64_t workspace_size(const MaskLossParams<A>& p) {
  return Workspace<A>(p, nullptr).size;
}

// (1) of an output row, in ws.x.
template <typename A>
void upsample_row(const MaskLossParams<A>& p, int64_t plane, const Between<A>& y, Workspace<A>& ws) {
  const A *above = p.logits + (plane * p.h + y.low) * p.w, *below = p.logits + (plane * p.h + y.high) * p.w;
  for (int64_t i = 0; i < p.w; ++i) ws.line[i] = y.to_low * above[i] + y.to_high * below[i];
  for (int64_t X = 0; X < p.W; ++X) ws.x[X] = ws.to_low[X] * ws.line[ws.low[X]] + ws.to_high[X] * ws.line[ws.high[X]];
}

// Everything (2) and (5) need of one pixel. Logarithms by softplus: log(1 - q) would be -infinity from x = 17 on.
template <typename A>
struct Pixel {
  A q, v, softplus, slope;  // sigmoid(x), sigmoid(-t), softplus(-t), q (1 - q)

  Pixel(A x, bool positive) {
    const A e = exp_fast(x < A(0) ? x : -x), large = A(1) / (A(1) + e), small = e * large;
    const A t = positive ? x : -x;
    q = x < A(0) ? small : large;
    v = t < A(0) ? large : small;
    softplus = (t < A(0) ? -t : A(0)) + log1p_fast(e);
    slope = large * small;
  }
};

template <bool kSquare, typename A>
A power_of(A v, A gamma) {
  return kSquare ? v * v : power(v, gamma);
}

template <bool kSquare, typename A>
void forward_map(const MaskLossParams<A>& p, int64_t plane, Workspace<A>& ws) {
  const int64_t c = plane % p.C;
  const int32_t* codes = p.codes + plane / p.C * p.H * p.W;
  A *focal = ws.column, *q = focal + p.W, *qy = q + p.W, *y = qy + p.W, *pixels = y + p.W;
  for (int64_t i = 0; i < 5 * p.W; ++i) ws.column[i] = A(0);
  for (int64_t Y = 0; Y < p.H; ++Y) {
    upsample_row(p, plane, between<A>(Y, p.h, p.H), ws);
    const int32_t* code = codes + Y * p.W;
#pragma omp simd
    for (int64_t X = 0; X < p.W; ++X) {
      const bool positive = code[X] == c;
      const Pixel<A> at(ws.x[X], positive);
      const A counts = code[X] == kIgnored ? A(0) : A(1), weight = positive ? p.alpha : A(1) - p.alpha;
      focal[X] += counts * weight * power_of<kSquare>(at.v, p.gamma) * at.softplus;
      q[X] += counts * at.q, qy[X] += positive ? at.q : A(0), y[X] += positive ? A(1) : A(0), pixels[X] += counts;
    }
  }
  double sum[5] = {0, 0, 0, 0, 0};
  for (int64_t k = 0; k < 5; ++k) {
    for (int64_t X = 0; X < p.W; ++X) sum[k] += ws.column[k * p.W + X];
  }
  finish_mask_loss(p, plane, sum);
}

// Gradients of outputs between two rows of samples, on to those samples.
template <typename A>
void spread(const MaskLossParams<A>& p, int64_t plane, const Between<A>& y, Workspace<A>& ws) {
  A* grad = p.grad + plane * p.h * p.w;
  for (int64_t X = 0; X < p.W;) {
    const int64_t low = ws.low[X], high = ws.high[X];
    A part[4] = {0, 0, 0, 0};
    for (; X < p.W && ws.low[X] == low; ++X) {
      part[0] += ws.to_low[X] * ws.grad_low[X], part[1] += ws.to_high[X] * ws.grad_low[X];
      part[2] += ws.to_low[X] * ws.grad_high[X], part[3] += ws.to_high[X] * ws.grad_high[X];
    }
    grad[y.low * p.w + low] += part[0], grad[y.low * p.w + high] += part[1];
    grad[y.high * p.w + low] += part[2], grad[y.high * p.w + high] += part[3];
  }
  for (int64_t X = 0; X < p.W; ++X) ws.grad_low[X] = ws.grad_high[X] = A(0);
}

template <bool kSquare, typename A>
void backward_map(const MaskLossParams<A>& p, int64_t plane, Workspace<A>& ws) {
  const int64_t c = plane % p.C;
  const int32_t* codes = p.codes + plane / p.C * p.H * p.W;
  const MaskLossWeights<A> weights = mask_loss_weights(p, plane);
  for (int64_t i = 0; i < p.h * p.w; ++i) p.grad[plane * p.h * p.w + i] = A(0);
  for (int64_t X = 0; X < p.W; ++X) ws.grad_low[X] = ws.grad_high[X] = A(0);
  Between<A> last{};
  for (int64_t Y = 0; Y < p.H; ++Y) {
    const Between<A> row = between<A>(Y, p.h, p.H);
    if (Y > 0 && row.low != last.low) spread(p, plane, last, ws);
    last = row;
    upsample_row(p, plane, row, ws);
    const int32_t* code = codes + Y * p.W;
#pragma omp simd
    for (int64_t X = 0; X < p.W; ++X) {
      const bool positive = code[X] == c;
      const Pixel<A> at(ws.x[X], positive);
      const A bend = power_of<kSquare>(at.v, p.gamma) * (p.gamma * (A(1) - at.v) * at.softplus + at.v);
      const A focal = weights.focal * (positive ? -p.alpha : A(1) - p.alpha) * bend;
      const A dice = (weights.dice - (positive ? weights.dice_y : A(0))) * at.slope;
      const A grad = code[X] == kIgnored ? A(0) : focal + dice;
      ws.grad_low[X] += row.to_low * grad, ws.grad_high[X] += row.to_high * grad;
    }
  }
  spread(p, plane, last, ws);
}

template <typename A>
void forward(const MaskLossParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> ws(p, memory);
  ws.columns(p);
  for (int64_t plane = begin; plane < end; ++plane) {
    p.gamma == A(2) ? forward_map<true>(p, plane, ws) : forward_map<false>(p, plane, ws);
  }
}

template <typename A>
void backward(const MaskLossParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> ws(p, memory);
  ws.columns(p);
  for (int64_t plane = begin; plane < end; ++plane) {
    p.gamma == A(2) ? backward_map<true>(p, plane, ws) : backward_map<false>(p, plane, ws);
  }
}

template <typename A>
constexpr MaskLossTable<A> kTable = {workspace_size<A>, forward<A>, backward<A>};

}  // namespace

template <typename A>
const MaskLossTable<A>& mask_loss_table() {
  return kTable<A>;
}
template const MaskLossTable<float>& mask_loss_table<float>();
template const MaskLossTable<double>& mask_loss_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
