// window_argmax on CUDA: a block owns a tile of outputs. It bounds every class by the samples that reach the tile, and
// computes (1) to (4) only for the classes that can win, some at a time: (3) for the canvas pixels between which the
// tile lies, into shared memory, and (4) from there. Positions are computed once for a tile. With softmax of the
// windows a first kernel keeps, for each pixel of their crops, the largest value and the sum over the classes; other
// softmaxes are summed by the tile itself. Equation numbers: ovseg_kernels/ops/window_argmax.py.
#include "../common/candidates.cuh"
#include "../common/places.cuh"
#include "window_argmax_cuda.h"

namespace ovseg {
namespace {

constexpr int32_t kTile = kPrunedTile, kThreads = kPruningThreads;
constexpr int32_t kTogether = 4;  // classes computed at a time
constexpr int32_t kPixels = kTile * kTile / kThreads;  // outputs of a thread
constexpr int32_t kWindows = 16;  // windows whose positions a tile keeps at a time

// Blocks that shall fit on a multiprocessor: registers for three of float, two of double, and none spills.
template <typename A>
constexpr int kResident = sizeof(A) == 4 ? 3 : 2;

template <typename A>
__device__ A sigmoid(A x) {
  const A e = exp(-fabs(x)), large = reciprocal(A(1) + e);
  return x < A(0) ? e * large : large;
}

// The largest of some numbers and the sum of their exponentials: softmax.
template <typename A>
struct Softmax {
  A top = minus_infinity<A>(), sum = A(0);

  __device__ void add(const A (&x)[kTogether], int32_t count) {
    A next = top;
    for (int32_t t = 0; t < kTogether; ++t) next = t < count ? larger(x[t], next) : next;
    sum *= exp(top - next), top = next;
    for (int32_t t = 0; t < kTogether; ++t) sum += t < count ? exp(x[t] - next) : A(0);
  }
};

// A pixel of a crop between four samples.
template <typename A>
struct Around {
  int32_t place, to_right, to_below;  // elements of a map: the upper left sample, and from it to its neighbours
  A above, below, left, right;        // weights

  __device__ Around(const Place<A>& y, const Place<A>& x, int32_t w)
      : place(y.low * w + x.low),
        to_right(x.high - x.low),
        to_below((y.high - y.low) * w),
        above(y.to_low),
        below(y.to_high),
        left(x.to_low),
        right(x.to_high) {}
  __device__ A operator()(const A* map) const {  // (1)
    const A *upper = map + place, *lower = upper + to_below;
    const A on_the_left = weighted(above, upper[0]) + weighted(below, lower[0]);
    const A on_the_right = weighted(above, upper[to_right]) + weighted(below, lower[to_right]);
    return weighted(left, on_the_left) + weighted(right, on_the_right);
  }
};

template <typename A, bool kGroups>
__device__ int64_t elements_of_class(const WindowParams<A>& p) {  // from a class to the next
  return kGroups ? 1 : p.h * p.w;
}

// The row of a window's table at a pixel of its crop, (2).
template <typename A>
__device__ const A* table_row(const WindowParams<A>& p, int64_t window, int64_t pixel) {
  const int64_t g = p.index[pixel], last = p.G - 1;
  return p.values + (window * p.G + (g < 0 ? 0 : g < last ? g : last)) * p.C;
}

// The softmax of every pixel of every crop.
template <typename A, bool kGroups>
__global__ void __launch_bounds__(kThreads, kResident<A>) window_argmax_norm_kernel(WindowParams<A> p, int64_t pixels, A* norms) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, step = elements_of_class<A, kGroups>(p);
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < pixels; at += stride) {
    const int64_t k = at / (p.hc * p.wc);
    Softmax<A> found;
    auto add_all = [&](const A* values, const auto& value_of) {
      for (int64_t c = 0; c < p.C; c += kTogether) {
        const int32_t count = static_cast<int32_t>(p.C - c < kTogether ? p.C - c : kTogether);
        A x[kTogether];
#pragma unroll
        for (int32_t t = 0; t < kTogether; ++t) x[t] = value_of(values + (c + (t < count ? t : 0)) * step);
        found.add(x, count);
      }
    };
    if constexpr (kGroups) {
      add_all(table_row(p, k, at), [](const A* x) { return *x; });
    } else {
      const Place<A> y = place_of<A>(at / p.wc % p.hc, p.h, p.hc), x = place_of<A>(at % p.wc, p.w, p.wc);
      add_all(p.values + k * p.C * step, Around<A>(y, x, static_cast<int32_t>(p.w)));
    }
    norms[at] = found.top, norms[pixels + at] = A(1) / found.sum;
  }
}

// A window, and what of it reaches the tile: rows and columns of its crop, and of its samples.
struct Cover {
  int64_t window, y, x;    // y, x: its corner on the canvas
  int64_t v0, v1, u0, u1;  // [v0, v1) x [u0, u1) of the crop
  int32_t r0, r1, s0, s1;  // [r0, r1] x [s0, s1] of the samples
};

// Rows or columns of a tile: its outputs, and the lines of the canvas between which they lie. These follow one another
// where there is room for all from the first to the last; where outputs lie far apart there are two of each.
struct Axis {
  int64_t first, begin, end;  // first output; lines of the canvas [begin, end)
  int32_t outputs, lines;
  bool dense;

  __device__ Axis(int64_t first_, int64_t labels, int64_t begin_, int64_t end_, int64_t room)
      : first(first_), begin(begin_), end(end_), dense(end_ - begin_ <= room) {
    outputs = static_cast<int32_t>(labels - first < kTile ? labels - first : kTile);
    lines = dense ? static_cast<int32_t>(end - begin) : 2 * outputs;
  }
  // Where output i lies between two lines of the tile.
  template <typename A>
  __device__ Place<A> place(int32_t i, int64_t canvas, int64_t labels) const {
    Place<A> found = place_of<A>(first + i, canvas, labels);
    found.low = dense ? found.low - static_cast<int32_t>(begin) : 2 * i;
    found.high = dense ? found.high - static_cast<int32_t>(begin) : 2 * i + 1;
    return found;
  }
  template <typename A>
  __device__ int64_t line(int32_t i, int64_t canvas, int64_t labels) const {  // on the canvas
    if (dense) return begin + i;
    const Place<A> at = place_of<A>(first + i / 2, canvas, labels);
    return i % 2 ? at.high : at.low;
  }
};

// Where a line of the canvas lies in a window: between two samples, or at a line of its index; low -1 outside of it.
template <typename A, bool kGroups>
__device__ Place<A> place_in_window(int64_t line, int64_t corner, int64_t crop, int64_t samples) {
  if (line < corner || line - crop >= corner) return {A(0), A(0), -1, -1};
  if constexpr (kGroups) return {A(1), A(0), static_cast<int32_t>(line - corner), static_cast<int32_t>(line - corner)};
  return place_of<A>(line - corner, samples, crop);
}

// What a block keeps in shared memory. `lines` are those of WindowPlan.
template <typename A>
struct TileMemory {
  Place<A> *rows, *columns;                // [kTile]: outputs between lines of the tile
  Place<A> *window_rows, *window_columns;  // [windows, lines]: lines in windows
  Cover* covers;                           // [windows]
  int64_t* edges;                          // [4]: lines of the canvas, down and across
  A* canvas;                               // [kTogether, lines, lines]: (3)
  A* counts;                               // [lines, lines]: windows that cover a pixel, where there are many
  A *tops, *sums;                          // [lines, lines]: softmax of merged windows
  unsigned char *candidates, *present;     // present: [G], groups that lie in the tile
  size_t bytes = 0;

  OVSEG_ANYWHERE_MEMBER TileMemory(unsigned char* base, const WindowParams<A>& p, const WindowPlan& plan) {
    const int64_t area = static_cast<int64_t>(plan.down) * plan.across;
    const bool summed = p.activation == Activation::softmax && p.stage == Stage::merged;
    rows = take<Place<A>>(base, kTile), columns = take<Place<A>>(base, kTile);
    window_rows = take<Place<A>>(base, plan.windows * plan.down);
    window_columns = take<Place<A>>(base, plan.windows * plan.across);
    covers = take<Cover>(base, plan.windows), edges = take<int64_t>(base, 4);
    canvas = take<A>(base, kTogether * area), counts = take<A>(base, p.n > plan.windows ? area : 0);
    tops = take<A>(base, summed ? area : 0), sums = take<A>(base, summed ? area : 0);
    candidates = take<unsigned char>(base, static_cast<int64_t>(candidates_bytes<A>(p.C)));
    present = take<unsigned char>(base, p.index ? p.G : 0);
  }
  template <typename T>
  OVSEG_ANYWHERE_MEMBER T* take(unsigned char* base, int64_t count) {
    T* found = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return found;
  }
};

template <typename A, bool kGroups, bool kSoftmax>
struct Tile {
  const WindowParams<A>& p;
  const WindowPlan& plan;
  const TileMemory<A>& memory;
  const A* norms;  // [2, pixels]: softmax of windows
  int64_t pixels;
  Axis down, across;
  int32_t covering = 0;  // windows that reach the tile

  __device__ int32_t area() const { return down.lines * across.lines; }
  __device__ int32_t batches() const { return (covering + plan.windows - 1) / plan.windows; }

  __device__ bool covers(int64_t k, Cover& found) const {
    const int64_t y = p.origins[2 * k], x = p.origins[2 * k + 1];
    if (y <= -p.hc || x <= -p.wc) return false;  // origins may be anything: begin - y must not overflow
    found.window = k, found.y = y, found.x = x;
    found.v0 = down.begin > y ? down.begin - y : 0, found.v1 = down.end - y < p.hc ? down.end - y : p.hc;
    found.u0 = across.begin > x ? across.begin - x : 0, found.u1 = across.end - x < p.wc ? across.end - x : p.wc;
    return found.v0 < found.v1 && found.u0 < found.u1;
  }

  // Where the tile's outputs lie on its canvas. All threads call.
  __device__ void place_outputs() const {
    const int32_t i = threadIdx.x, j = i - 32;  // by another warp
    if (i < down.outputs) memory.rows[i] = down.place<A>(i, p.Hc, p.H);
    if (0 <= j && j < across.outputs) memory.columns[j] = across.place<A>(j, p.Wc, p.W);
  }

  // The windows of a batch, and where the tile's canvas lies in them. All threads call; they meet before and after.
  __device__ void open(int32_t batch) {
    __syncthreads();
    const int32_t first = batch * plan.windows;
    covering = 0;
#pragma unroll 1
    for (int64_t k = 0; k < p.n; ++k) {
      Cover found;
      if (!covers(k, found)) continue;
      if (threadIdx.x == 0 && covering >= first && covering < first + plan.windows) {
        memory.covers[covering - first] = found;
      }
      ++covering;
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; !kGroups && i < 4 * in_batch(batch); i += kThreads) {
      Cover& of = memory.covers[i / 4];
      const bool vertical = i % 4 < 2;
      const int64_t at = i % 4 == 0 ? of.v0 : i % 4 == 1 ? of.v1 - 1 : i % 4 == 2 ? of.u0 : of.u1 - 1;
      const Place<A> found = place_of<A>(at, vertical ? p.h : p.w, vertical ? p.hc : p.wc);
      if (i % 4 == 0) of.r0 = found.low;
      if (i % 4 == 1) of.r1 = found.high;
      if (i % 4 == 2) of.s0 = found.low;
      if (i % 4 == 3) of.s1 = found.high;
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < in_batch(batch) * down.lines; i += kThreads) {
      const int64_t line = down.line<A>(i % down.lines, p.Hc, p.H);
      memory.window_rows[i] = place_in_window<A, kGroups>(line, memory.covers[i / down.lines].y, p.hc, p.h);
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < in_batch(batch) * across.lines; i += kThreads) {
      const int64_t line = across.line<A>(i % across.lines, p.Wc, p.W);
      memory.window_columns[i] = place_in_window<A, kGroups>(line, memory.covers[i / across.lines].x, p.wc, p.w);
    }
    __syncthreads();
  }
  __device__ int32_t in_batch(int32_t batch) const {
    const int32_t rest = covering - batch * plan.windows;
    return rest < plan.windows ? rest : plan.windows;
  }

  // The groups that lie in the tile. All threads call.
  __device__ void find_groups() const {
    for (int64_t g = threadIdx.x; g < p.G; g += kThreads) memory.present[g] = 0;
    __syncthreads();
    for (int32_t k = 0; k < covering; ++k) {
      const Cover& window = memory.covers[k];
      const int64_t width = window.u1 - window.u0;
      for (int64_t i = threadIdx.x; i < (window.v1 - window.v0) * width; i += kThreads) {
        const int64_t g = p.index[(window.window * p.hc + window.v0 + i / width) * p.wc + window.u0 + i % width];
        memory.present[g < 0 ? 0 : g < p.G - 1 ? g : p.G - 1] = 1;
      }
    }
    __syncthreads();
  }

  // Least and largest of a class among what reaches the tile: a mean lies between its least and its largest part.
  __device__ void range(int32_t c, A& low, A& high) const {
    low = static_cast<A>(INFINITY), high = minus_infinity<A>();
    for (int32_t k = 0; k < covering; ++k) {
      const Cover& window = memory.covers[k];
      if constexpr (kGroups) {
        const A* column = p.values + window.window * p.G * p.C + c;
        for (int64_t g = 0; g < p.G; ++g) {
          if (memory.present[g]) low = fmin(low, column[g * p.C]), high = fmax(high, column[g * p.C]);
        }
      } else {
        const A* map = p.values + (window.window * p.C + c) * p.h * p.w;
        const int32_t w = static_cast<int32_t>(p.w);
        for (int32_t r = window.r0; r <= window.r1; ++r) {
          for (int32_t s = window.s0; s <= window.s1; ++s) {
            const A x = map[r * w + s];
            low = fmin(low, x), high = fmax(high, x);
          }
        }
      }
    }
  }

  // Adds what the windows of a batch have at pixel (i, j) of the tile's canvas, of some classes, `at` elements behind
  // the first; returns how many windows there are.
  __device__ A add_windows(int32_t batch, int32_t i, int32_t j, const int64_t (&at)[kTogether],
                           A (&sum)[kTogether]) const {
    const bool sigmoids = p.activation == Activation::sigmoid && p.stage == Stage::window;
    const bool summed = kSoftmax && p.stage == Stage::window;
    A count = A(0);
    for (int32_t k = 0; k < in_batch(batch); ++k) {
      const Cover& window = memory.covers[k];
      const Place<A> y = memory.window_rows[k * down.lines + i], x = memory.window_columns[k * across.lines + j];
      if (y.low < 0 || x.low < 0) continue;
      count += A(1);
      A value[kTogether];
      int64_t pixel = 0;  // of the crop
      if (kGroups || summed) {
        const int64_t v = down.line<A>(i, p.Hc, p.H) - window.y, u = across.line<A>(j, p.Wc, p.W) - window.x;
        pixel = (window.window * p.hc + v) * p.wc + u;
      }
      if constexpr (kGroups) {
        const A* row = table_row(p, window.window, pixel);
#pragma unroll
        for (int32_t t = 0; t < kTogether; ++t) value[t] = row[at[t]];
      } else {
        const A* maps = p.values + window.window * p.C * p.h * p.w;
        const Around<A> around(y, x, static_cast<int32_t>(p.w));
#pragma unroll
        for (int32_t t = 0; t < kTogether; ++t) value[t] = around(maps + at[t]);
      }
      const A top = summed ? norms[pixel] : A(0), inverse = summed ? norms[pixels + pixel] : A(0);
#pragma unroll
      for (int32_t t = 0; t < kTogether; ++t) {
        sum[t] += sigmoids ? sigmoid(value[t]) : summed ? exp(value[t] - top) * inverse : value[t];
      }
    }
    return count;
  }

  // The elements up to the classes first, first + 1, ... of a list of `total`, or of all; the last one stands for what
  // lies beyond. Returns how many are there.
  __device__ int32_t places_of(const int32_t* list, int32_t first, int32_t total, int64_t (&at)[kTogether]) const {
#pragma unroll
    for (int32_t t = 0; t < kTogether; ++t) {
      const int32_t place = first + t < total ? first + t : total - 1;
      at[t] = (list ? list[place] : place) * elements_of_class<A, kGroups>(p);
    }
    return total - first < kTogether ? total - first : kTogether;
  }

  // (3) of some classes into memory.canvas, `bent` by the activation or not; a pixel always by the same thread. All
  // threads call; they meet before and after.
  __device__ void fill_canvas(const int64_t (&at)[kTogether], bool bent) {
    const int32_t last = batches() > 0 ? batches() - 1 : 0;
    __syncthreads();
    for (int32_t batch = 0; batch <= last; ++batch) {
      if (last > 0) open(batch);
      for (int32_t i = threadIdx.x; i < area(); i += kThreads) {
        A sum[kTogether];
#pragma unroll
        for (int32_t t = 0; t < kTogether; ++t) sum[t] = batch ? memory.canvas[t * area() + i] : A(0);
        A count = add_windows(batch, i / across.lines, i % across.lines, at, sum);
        if (last > 0) memory.counts[i] = count = (batch ? memory.counts[i] : A(0)) + count;
        if (batch == last && count > A(1)) {
          const A share = A(1) / count;
#pragma unroll
          for (int32_t t = 0; t < kTogether; ++t) sum[t] *= share;
        }
#pragma unroll
        for (int32_t t = 0; t < kTogether; ++t) {
          memory.canvas[t * area() + i] = batch == last && bent && p.stage == Stage::merged ? bend(sum[t], i) : sum[t];
        }
      }
    }
    __syncthreads();
  }
  __device__ A bend(A x, int32_t i) const {
    if (kSoftmax) return exp(x - memory.tops[i]) / memory.sums[i];
    return p.activation == Activation::sigmoid ? sigmoid(x) : x;
  }

  // Takes the classes in memory.canvas into the softmax of every pixel there.
  __device__ void add_to_sums(bool first, int32_t count) const {
    for (int32_t i = threadIdx.x; i < area(); i += kThreads) {
      A merged[kTogether];
#pragma unroll
      for (int32_t t = 0; t < kTogether; ++t) merged[t] = memory.canvas[t * area() + i];
      Softmax<A> found;
      if (!first) found.top = memory.tops[i], found.sum = memory.sums[i];
      found.add(merged, count);
      memory.tops[i] = found.top, memory.sums[i] = found.sum;
    }
  }
};

// An output between four pixels of the tile's canvas. One that has no weight does not count: no window may cover it.
template <typename A>
struct Resized {
  int32_t at[4];
  A above, below, left, right;  // weights

  __device__ Resized(const Place<A>& y, const Place<A>& x, int32_t width)
      : at{y.low * width + x.low, y.high * width + x.low, y.low * width + x.high, y.high * width + x.high},
        above(y.to_low),
        below(y.to_high),
        left(x.to_low),
        right(x.to_high) {}
  __device__ A operator()(const A* canvas) const {  // (4) without the bias
    return weighted(left, weighted(above, canvas[at[0]]) + weighted(below, canvas[at[1]])) +
           weighted(right, weighted(above, canvas[at[2]]) + weighted(below, canvas[at[3]]));
  }
};

template <typename A>
__device__ void flag_what_is_refused(const WindowParams<A>& p, int64_t count, bool finite) {
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * gridDim.y * kThreads;
  const A most = static_cast<A>(INFINITY);
  for (int64_t i = block * kThreads + threadIdx.x; i < count; i += stride) {
    const A x = p.values[i];
    if (!(x < most) || (finite && !(x > -most))) *p.flag = 1;
  }
  for (int64_t c = threadIdx.x; c < (block == 0 && p.bias ? p.C : 0); c += kThreads) {
    if (!(p.bias[c] < most)) *p.flag = 1;
  }
}

template <typename A, bool kGroups, bool kSoftmax>
__global__ void __launch_bounds__(kThreads, kResident<A>)
    window_argmax_fwd_kernel(const __grid_constant__ WindowParams<A> p, const __grid_constant__ WindowPlan plan,
                             const A* norms, int64_t pixels) {
  OVSEG_DYNAMIC_SHARED(shared);
  const TileMemory<A> memory(shared, p, plan);
  if (p.flag) flag_what_is_refused(p, p.n * p.C * (kGroups ? p.G : p.h * p.w), kSoftmax);
  const int64_t Y0 = static_cast<int64_t>(blockIdx.y) * kTile, X0 = static_cast<int64_t>(blockIdx.x) * kTile;
  if (threadIdx.x < 4) {
    const bool vertical = threadIdx.x < 2;
    const int64_t labels = vertical ? p.H : p.W, first = vertical ? Y0 : X0;
    const int64_t last = first + kTile < labels ? first + kTile - 1 : labels - 1;
    const Place<A> found = place_of<A>(threadIdx.x % 2 ? last : first, vertical ? p.Hc : p.Wc, labels);
    memory.edges[threadIdx.x] = threadIdx.x % 2 ? found.high + 1 : found.low;
  }
  __syncthreads();
  Tile<A, kGroups, kSoftmax> tile{p,
                                  plan,
                                  memory,
                                  norms,
                                  pixels,
                                  Axis(Y0, p.H, memory.edges[0], memory.edges[1], plan.down),
                                  Axis(X0, p.W, memory.edges[2], memory.edges[3], plan.across)};
  tile.place_outputs();
  tile.open(0);
  // Softmax of the outputs without a bias leaves their order alone; in all other places its sums differ from pixel to
  // pixel, and every class is computed. So it is where there are windows that are not at hand.
  const bool bounded = (!kSoftmax || (p.stage == Stage::output && !p.bias)) && tile.batches() <= 1;
  if (kGroups && bounded) tile.find_groups();
  const bool sigmoids = p.activation == Activation::sigmoid;
  const Candidates<A> found =
      find_candidates<A>(static_cast<int32_t>(p.C), memory.candidates, [&](int32_t c, A& least, A& most) {
        least = minus_infinity<A>(), most = static_cast<A>(INFINITY);
        if (!bounded) return;
        const A add = p.bias ? p.bias[c] : A(0);
        tile.range(c, least, most);
        least = (sigmoids ? sigmoid(least) : least) + add, most = (sigmoids ? sigmoid(most) : most) + add;
      });

  auto row = [&](int32_t k) { return (static_cast<int32_t>(threadIdx.x) + k * kThreads) / kTile; };
  auto column = [&](int32_t k) { return (static_cast<int32_t>(threadIdx.x) + k * kThreads) % kTile; };
  auto there = [&](int32_t k) { return row(k) < tile.down.outputs && column(k) < tile.across.outputs; };
  auto resized = [&](int32_t k) {  // of an output that is not there: the first one
    return Resized<A>(memory.rows[there(k) ? row(k) : 0], memory.columns[there(k) ? column(k) : 0], tile.across.lines);
  };
  const Resized<A> outputs[kPixels] = {resized(0), resized(1)};
  A best[kPixels];
  int32_t winner[kPixels];
  Softmax<A> sums[kPixels];  // of the outputs
  for (int32_t k = 0; k < kPixels; ++k) best[k] = minus_infinity<A>(), winner[k] = found.list[0];
  const bool wanted = found.count > 1 || p.value || p.has_threshold;
  // Softmax of merged windows or of outputs: a first pass over all classes for its sums, and then the one for labels.
  for (bool summing = kSoftmax && p.stage != Stage::window;; summing = false) {
    const int32_t total = summing ? static_cast<int32_t>(p.C) : found.count;
    for (int32_t first = 0; wanted && first < total; first += kTogether) {
      int64_t at[kTogether];
      const int32_t count = tile.places_of(summing ? nullptr : found.list, first, total, at);
      tile.fill_canvas(at, !summing);
      if (summing && p.stage == Stage::merged) {
        tile.add_to_sums(first == 0, count);
        continue;
      }
      if (summing) {
#pragma unroll
        for (int32_t k = 0; k < kPixels; ++k) {
          A z[kTogether];
#pragma unroll
          for (int32_t t = 0; t < kTogether; ++t) z[t] = outputs[k](memory.canvas + t * tile.area());
          sums[k].add(z, count);
        }
        continue;
      }
      for (int32_t t = 0; t < count; ++t) {
        const int32_t c = found.list[first + t];
        const A add = p.bias ? p.bias[c] : A(0);
#pragma unroll
        for (int32_t k = 0; k < kPixels; ++k) {
          A z = outputs[k](memory.canvas + t * tile.area());
          if (sigmoids && p.stage == Stage::output) z = sigmoid(z);
          if (kSoftmax && p.stage == Stage::output) z = exp(z - sums[k].top) / sums[k].sum;
          z += add;
          if (z > best[k]) best[k] = z, winner[k] = c;
        }
      }
    }
    if (!summing) break;
  }
  for (int32_t k = 0; k < kPixels; ++k) {
    if (there(k)) put_label(p, (Y0 + row(k)) * p.W + X0 + column(k), winner[k], best[k]);
  }
}

// Lines of the canvas for which a tile has room: those from its first output to its last, or two of each output.
int32_t room(int64_t canvas, int64_t labels) {
  const int64_t most = 2 * kTile, far = int64_t(1) << 22;  // positions beyond are not exact in float
  const int64_t span = (kTile - 1) * canvas / labels + 4;
  return static_cast<int32_t>(span < most && canvas < far && labels < far ? span : most);
}

template <typename A, bool kGroups, bool kSoftmax>
const char* run_on_device(const WindowParams<A>& p, A* norms, void* stream) {
  const int64_t pixels = window_norms(p) / 2;
  const int64_t windows = p.n < kWindows ? p.n : kWindows;
  const WindowPlan plan{room(p.Hc, p.H), room(p.Wc, p.W), static_cast<int32_t>(windows)};
  const size_t shared = TileMemory<A>(nullptr, p, plan).bytes;
  if (shared > 99 * 1024) return "too many classes and groups for shared memory; use OVSEG_BACKEND=reference";
  const int64_t down = ceil_div(p.H, kTile), across = ceil_div(p.W, kTile);
  if (down > 65535) return "more than a million rows of labels; use OVSEG_BACKEND=reference";
  if (p.Hc > INT32_MAX || p.Wc > INT32_MAX || p.h * p.w > INT32_MAX || p.C > INT32_MAX) {
    return "more than 2^31 - 1 classes, samples of a map or rows of the canvas; use OVSEG_BACKEND=reference";
  }
  if (kSoftmax && pixels) {
    const unsigned blocks = static_cast<unsigned>(pixels < (1 << 20) ? ceil_div(pixels, kThreads) : 8192);
    OVSEG_TRY(OVSEG_LAUNCH((window_argmax_norm_kernel<A, kGroups>), blocks, kThreads, 0, stream, p, pixels, norms));
  }
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  return OVSEG_LAUNCH((window_argmax_fwd_kernel<A, kGroups, kSoftmax>), grid, kThreads, shared, stream, p, plan, norms,
                      pixels);
}

}  // namespace

template <typename A>
const char* window_argmax_on_device(const WindowParams<A>& p, A* norms, void* stream) {
  if (p.activation == Activation::softmax) {
    return p.index ? run_on_device<A, true, true>(p, norms, stream) : run_on_device<A, false, true>(p, norms, stream);
  }
  return p.index ? run_on_device<A, true, false>(p, norms, stream) : run_on_device<A, false, false>(p, norms, stream);
}

template const char* window_argmax_on_device(const WindowParams<float>&, float*, void*);
template const char* window_argmax_on_device(const WindowParams<double>&, double*, void*);

}  // namespace ovseg
