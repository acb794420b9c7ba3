// window_argmax on the CPU. Compiled once per instruction set. A task owns a tile of outputs. It finds the canvas
// pixels between which they lie, the windows that cover those and the samples that reach them; from the samples it
// bounds every class, and it computes (1) to (4) only for the classes that can win.
#include "../common/simd.h"
#include "../common/workspace.h"
#include "window_argmax.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

constexpr int64_t kLines = 2 * kPrunedTile,
                  kArea = kLines * kLines;  // canvas rows or columns between which a tile lies
template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());
template <typename A>
constexpr A kEpsilon = sizeof(A) == 4 ? A(1.2e-7) : A(2.3e-16);

template <typename A>
A sigmoid(A x) {
  const A e = exp_fast(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

// Rows or columns of a tile, outputs and the canvas lines between which they lie.
template <typename A>
struct Axis {
  int64_t first, count, lines;                  // outputs; canvas lines
  int64_t line[kLines];                         // on the canvas, rising
  int32_t low[kPrunedTile], high[kPrunedTile];  // of an output: places in line
  A to_low[kPrunedTile], to_high[kPrunedTile];

  void open(int64_t start, int64_t outputs, int64_t samples) {
    first = start, count = outputs - start < kPrunedTile ? outputs - start : kPrunedTile, lines = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Between<A> at = between<A>(first + i, samples, outputs);
      low[i] = place(at.low), high[i] = place(at.high);
      to_low[i] = at.to_low, to_high[i] = at.to_high;
    }
  }
  int32_t place(int64_t at) {  // lines come rising, and a line comes again at most as the one before the last
    for (int64_t back = 1; back <= 2 && back <= lines; ++back) {
      if (line[lines - back] == at) return static_cast<int32_t>(lines - back);
    }
    line[lines] = at;
    return static_cast<int32_t>(lines++);
  }
};

// The lines of an axis that a window covers, and its samples there.
template <typename A>
struct Cover {
  int64_t begin, end, from, to;  // covered lines [begin, end); samples [from, to) that reach them
  int64_t origin;
  int32_t low[kLines], high[kLines];  // samples, counted from `from`
  A to_low[kLines], to_high[kLines];

  bool open(const Axis<A>& axis, int64_t origin_, int64_t crop, int64_t samples) {
    origin = origin_, begin = 0;
    while (begin < axis.lines && axis.line[begin] < origin) ++begin;
    end = begin;
    while (end < axis.lines && axis.line[end] < origin + crop) ++end;
    if (begin == end) return false;
    from = between<A>(axis.line[begin] - origin, samples, crop).low;
    for (int64_t i = begin; i < end; ++i) {
      const Between<A> at = between<A>(axis.line[i] - origin, samples, crop);
      low[i] = static_cast<int32_t>(at.low - from), high[i] = static_cast<int32_t>(at.high - from);
      to_low[i] = at.to_low, to_high[i] = at.to_high, to = at.high + 1;
    }
    return true;
  }
};

template <typename A>
struct Window {
  int64_t k;
  Cover<A> rows, columns;
  A least_norm, most_norm;  // with softmax: the range of the logarithms of its sums
  int32_t groups;           // with tables: how many of them lie in the tile
};

template <typename A>
struct Workspace {
  Axis<A>*rows, *columns;
  Window<A>* windows;                       // [n]
  A *least, *most;                          // bounds of each class
  A *line, *raw, *merged, *output;          // a row of samples, maps of canvas lines, map of outputs
  A *inverse, *best;                        // how many windows cover a canvas pixel; the best value of an output
  A *top, *sum;                             // with softmax: the largest value and the sum over classes, each [n, area]
  int32_t *list, *loud, *winner, *present;  // candidates, classes that count in a sum, winners, groups [n, G]
  int64_t size;

  Workspace(const WindowParams<A>& p, A* base) {
    Arena<A> arena(base);
    const int64_t norms = p.activation != Activation::softmax ? 0 : p.stage == Stage::window ? p.n * kArea : kArea;
    rows = arena.template take<Axis<A>>(1), columns = arena.template take<Axis<A>>(1),
    windows = arena.template take<Window<A>>(p.n);
    least = arena.template take<A>(p.C), most = arena.template take<A>(p.C), line = arena.template take<A>(p.w);
    raw = arena.template take<A>(kArea), merged = arena.template take<A>(kArea),
    output = arena.template take<A>(kPrunedTile * kPrunedTile);
    inverse = arena.template take<A>(kArea), best = arena.template take<A>(kPrunedTile * kPrunedTile);
    top = arena.template take<A>(norms), sum = arena.template take<A>(norms);
    list = arena.template take<int32_t>(p.C), loud = arena.template take<int32_t>(norms ? p.C : 0);
    winner = arena.template take<int32_t>(kPrunedTile * kPrunedTile),
    present = arena.template take<int32_t>(p.index ? p.n * p.G : 0);
    size = arena.size();
  }
};

template <typename A>
struct Tile {
  const WindowParams<A>& p;
  Workspace<A>& ws;
  int64_t covering = 0, lines, area, outputs;
  bool whole = true;  // every covering window covers the whole tile
  A least_norm = 0, most_norm = 0;

  Tile(const WindowParams<A>& params, Workspace<A>& workspace, int64_t Y, int64_t X) : p(params), ws(workspace) {
    ws.rows->open(Y, p.H, p.Hc), ws.columns->open(X, p.W, p.Wc);
    lines = ws.columns->lines, area = ws.rows->lines * lines, outputs = ws.rows->count * ws.columns->count;
    for (int64_t i = 0; i < area; ++i) ws.inverse[i] = A(0);
    for (int64_t k = 0; k < p.n; ++k) {
      Window<A>& window = ws.windows[covering];
      if (!window.rows.open(*ws.rows, p.origins[2 * k], p.hc, p.index ? p.hc : p.h)) continue;
      if (!window.columns.open(*ws.columns, p.origins[2 * k + 1], p.wc, p.index ? p.wc : p.w)) continue;
      window.k = k;
      each_covered(window, [&](int64_t i, int64_t j) { ws.inverse[i * lines + j] += A(1); });
      const int64_t mine = (window.rows.end - window.rows.begin) * (window.columns.end - window.columns.begin);
      whole = whole && mine == area;
      if (p.index) find_groups(window);
      ++covering;
    }
    for (int64_t i = 0; i < area; ++i) ws.inverse[i] = ws.inverse[i] > A(0) ? A(1) / ws.inverse[i] : A(0);
  }

  template <typename F>
  void each_covered(const Window<A>& window, const F& f) const {
    for (int64_t i = window.rows.begin; i < window.rows.end; ++i) {
      for (int64_t j = window.columns.begin; j < window.columns.end; ++j) f(i, j);
    }
  }

  int16_t group(const Window<A>& window, int64_t i, int64_t j) const {
    const int64_t v = ws.rows->line[i] - window.rows.origin, u = ws.columns->line[j] - window.columns.origin;
    const int16_t g = p.index[(window.k * p.hc + v) * p.wc + u];
    return g < 0 ? 0 : g < p.G ? g : static_cast<int16_t>(p.G - 1);  // a direct call must not read out of bounds
  }

  void find_groups(Window<A>& window) {
    int32_t* present = ws.present + covering * p.G;
    window.groups = 0;
    each_covered(window, [&](int64_t i, int64_t j) {
      const int32_t g = group(window, i, j);
      for (int32_t known = 0; known < window.groups; ++known) {
        if (present[known] == g) return;
      }
      present[window.groups++] = g;
    });
  }

  // The least and the largest of the samples of a class that reach the tile.
  void samples(int64_t c, int64_t place, A& least, A& most) const {
    const Window<A>& window = ws.windows[place];
    least = kInfinity<A>, most = -kInfinity<A>;
    if (p.index) {
      for (int32_t g = 0; g < window.groups; ++g) {
        const A x = p.values[(window.k * p.G + ws.present[place * p.G + g]) * p.C + c];
        least = smaller(least, x), most = larger(most, x);
      }
      return;
    }
    const A* plane = p.values + (window.k * p.C + c) * p.h * p.w;
    for (int64_t y = window.rows.from; y < window.rows.to; ++y) {
      for (int64_t x = window.columns.from; x < window.columns.to; ++x) {
        least = smaller(least, plane[y * p.w + x]), most = larger(most, plane[y * p.w + x]);
      }
    }
  }

  // (1) or (2) for the canvas pixels of the tile that a window covers, in ws.raw.
  void window_values(int64_t c, const Window<A>& window) {
    if (p.index) {
      each_covered(window, [&](int64_t i, int64_t j) {
        ws.raw[i * lines + j] = p.values[(window.k * p.G + group(window, i, j)) * p.C + c];
      });
      return;
    }
    const Cover<A>&rows = window.rows, &columns = window.columns;
    const A* plane = p.values + (window.k * p.C + c) * p.h * p.w + rows.from * p.w + columns.from;
    const int64_t wide = columns.to - columns.from;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const A *above = plane + rows.low[i] * p.w, *below = plane + rows.high[i] * p.w;
      for (int64_t x = 0; x < wide; ++x) {
        ws.line[x] = weighted(rows.to_low[i], above[x]) + weighted(rows.to_high[i], below[x]);
      }
      A* out = ws.raw + i * lines;
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        out[j] = weighted(columns.to_low[j], ws.line[columns.low[j]]) +
                 weighted(columns.to_high[j], ws.line[columns.high[j]]);
      }
    }
  }

  // The activation of a value whose softmax, if any, runs over the largest value `top` and the sum `sum`.
  A activated(A x, const A* top, const A* sum, int64_t at) const {
    return p.activation == Activation::sigmoid ? sigmoid(x) : exp_fast(x - top[at]) / sum[at];
  }
  void activate(A* x, int64_t count) const {
    if (p.activation == Activation::sigmoid) {
      for (int64_t i = 0; i < count; ++i) x[i] = sigmoid(x[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) x[i] = exp_fast(x[i] - ws.top[i]) / ws.sum[i];
    }
  }
  bool active(Stage stage) const { return p.activation != Activation::none && p.stage == stage; }

  // (3), with whatever activations come before it, in ws.merged.
  void merge(int64_t c, bool with_activation) {
    for (int64_t i = 0; i < area; ++i) ws.merged[i] = A(0);
    for (int64_t place = 0; place < covering; ++place) {
      const Window<A>& window = ws.windows[place];
      window_values(c, window);
      const A *top = ws.top + place * kArea, *sum = ws.sum + place * kArea;
      for (int64_t i = window.rows.begin; i < window.rows.end; ++i) {
        const int64_t begin = i * lines + window.columns.begin, end = i * lines + window.columns.end;
        if (active(Stage::window)) {
          for (int64_t at = begin; at < end; ++at) ws.merged[at] += activated(ws.raw[at], top, sum, at);
        } else {
          for (int64_t at = begin; at < end; ++at) ws.merged[at] += ws.raw[at];
        }
      }
    }
    for (int64_t i = 0; i < area; ++i) ws.merged[i] *= ws.inverse[i];
    if (with_activation && active(Stage::merged)) activate(ws.merged, area);
  }

  // (4) without the bias, in ws.output.
  void resize(int64_t c, bool with_activation) {
    merge(c, true);
    const Axis<A>&rows = *ws.rows, &columns = *ws.columns;
    for (int64_t i = 0; i < rows.count; ++i) {
      const A *above = ws.merged + rows.low[i] * lines, *below = ws.merged + rows.high[i] * lines;
      for (int64_t j = 0; j < lines; ++j) {  // ws.raw is free by now
        ws.raw[j] = weighted(rows.to_low[i], above[j]) + weighted(rows.to_high[i], below[j]);
      }
      A* out = ws.output + i * columns.count;
      for (int64_t j = 0; j < columns.count; ++j) {
        out[j] =
            weighted(columns.to_low[j], ws.raw[columns.low[j]]) + weighted(columns.to_high[j], ws.raw[columns.high[j]]);
      }
    }
    if (with_activation && active(Stage::output)) activate(ws.output, outputs);
  }

  // What (3) makes of the bounds of the windows, each bent by at_least(bound, window) or at_most first.
  template <typename F, typename G>
  void bounds(int64_t c, A& least, A& most, const F& at_least, const G& at_most) const {
    least = whole ? A(0) : kInfinity<A>, most = whole ? A(0) : -kInfinity<A>;
    for (int64_t place = 0; place < covering; ++place) {
      A x, y;
      samples(c, place, x, y);
      x = at_least(x, ws.windows[place]), y = at_most(y, ws.windows[place]);
      least = whole ? least + x : smaller(least, x), most = whole ? most + y : larger(most, y);
    }
    if (whole) least /= static_cast<A>(covering), most /= static_cast<A>(covering);
  }

  // Bounds of (4). Softmax: exp(x) over the largest and the least sum of the tile.
  void final_bounds(int64_t c) {
    const bool sigmoids = p.activation == Activation::sigmoid;
    auto bent = [&](A x, A norm) { return sigmoids ? sigmoid(x) : exp_fast(smaller(x - norm, A(1))); };
    A least, most;
    if (active(Stage::window)) {
      bounds(
          c, least, most, [&](A x, const Window<A>& window) { return bent(x, window.most_norm); },
          [&](A x, const Window<A>& window) { return bent(x, window.least_norm); });
    } else {
      auto same = [](A x, const Window<A>&) { return x; };
      bounds(c, least, most, same, same);
      if (p.activation != Activation::none) least = bent(least, most_norm), most = bent(most, least_norm);
    }
    const A add = p.bias ? p.bias[c] : A(0);
    ws.least[c] = least + add, ws.most[c] = most + add;
  }

  // Softmax: the largest value and the sum over classes of exp(value - largest), of each pixel of the stage. A class
  // that lies `kQuiet` below another everywhere in the tile adds less than rounding and is left out.
  void normalize() {
    constexpr A kQuiet = sizeof(A) == 4 ? A(30) : A(60), kSafe = sizeof(A) == 4 ? A(60) : A(500);
    const int64_t maps = p.stage == Stage::window ? covering : 1;
    for (int64_t map = 0; map < maps; ++map) {
      auto range = [&](int64_t c, A& least, A& most) {
        auto same = [](A x, const Window<A>&) { return x; };
        p.stage == Stage::window ? samples(c, map, least, most) : bounds(c, least, most, same, same);
      };
      A floor = -kInfinity<A>, peak = -kInfinity<A>, least, most;
      for (int64_t c = 0; c < p.C; ++c) {
        range(c, least, most);
        floor = larger(floor, least), peak = larger(peak, most);
      }
      int64_t count = 0;
      for (int64_t c = 0; c < p.C; ++c) {
        range(c, least, most);
        if (!(most < floor - kQuiet)) ws.loud[count++] = static_cast<int32_t>(c);
      }
      A *top = ws.top + map * kArea, *sum = ws.sum + map * kArea;
      const int64_t pixels = p.stage == Stage::output ? outputs : area;
      // Every pixel has a class at the floor or above: where the peak is near, exp(value - peak) keeps it in range, and
      // the pass that looks for the largest value of each pixel is spared.
      const bool near = peak - floor < kSafe;
      for (int64_t i = 0; i < pixels; ++i) top[i] = near ? peak : -kInfinity<A>, sum[i] = A(0);
      for (int pass = near ? 1 : 0; pass < 2; ++pass) {
        for (int64_t at = 0; at < count; ++at) {
          const A* x = before(ws.loud[at], map);
          auto add = [&](int64_t i) {
            if (pass == 0) top[i] = larger(top[i], x[i]);
            if (pass == 1) sum[i] += exp_fast(x[i] - top[i]);
          };
          if (p.stage == Stage::window) {
            each_covered(ws.windows[map], [&](int64_t i, int64_t j) { add(i * lines + j); });
          } else {
            for (int64_t i = 0; i < pixels; ++i) add(i);
          }
        }
      }
      A low = kInfinity<A>, high = -kInfinity<A>;
      auto widen = [&](int64_t i) {
        const A norm = top[i] + log_of(sum[i]);
        low = smaller(low, norm), high = larger(high, norm);
      };
      if (p.stage == Stage::window) {
        each_covered(ws.windows[map], [&](int64_t i, int64_t j) { widen(i * lines + j); });
      } else {
        for (int64_t i = 0; i < pixels; ++i) widen(i);
      }
      // Their own rounding must not cut a winner off.
      const A slack = 16 * kEpsilon<A> * (1 + larger(low < 0 ? -low : low, high < 0 ? -high : high));
      low -= slack, high += slack;
      if (p.stage == Stage::window) {
        ws.windows[map].least_norm = low, ws.windows[map].most_norm = high;
      } else {
        least_norm = low, most_norm = high;
      }
    }
  }
  const A* before(int64_t c, int64_t map) {  // the values that the activation acts on
    if (p.stage == Stage::window) return window_values(c, ws.windows[map]), ws.raw;
    if (p.stage == Stage::merged) return merge(c, false), ws.merged;
    return resize(c, false), ws.output;
  }

  void run() {
    if (p.activation == Activation::softmax) normalize();
    A floor = -kInfinity<A>;
    for (int64_t c = 0; c < p.C; ++c) final_bounds(c), floor = larger(floor, ws.least[c]);
    // A little below: rounding, and a polynomial exp that need not be monotone in the last bit, must not cut a winner
    // off.
    const A lowest = floor - 16 * kEpsilon<A> * (1 + (floor < 0 ? -floor : floor));
    int64_t count = 0;
    for (int64_t c = 0; c < p.C; ++c) {
      ws.list[count] = static_cast<int32_t>(c);
      count += ws.most[c] < lowest ? 0 : 1;
    }
    for (int64_t i = 0; i < outputs; ++i) ws.best[i] = -kInfinity<A>, ws.winner[i] = ws.list[0];
    for (int64_t at = 0; at < count && (count > 1 || p.value || p.has_threshold); ++at) {
      const int32_t c = ws.list[at];
      const A add = p.bias ? p.bias[c] : A(0);
      resize(c, true);
      for (int64_t i = 0; i < outputs; ++i) {
        const A value = ws.output[i] + add;
        ws.winner[i] = value > ws.best[i] ? c : ws.winner[i];
        ws.best[i] = value > ws.best[i] ? value : ws.best[i];
      }
    }
    const Axis<A>&rows = *ws.rows, &columns = *ws.columns;
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t j = 0; j < columns.count; ++j) {
        const int64_t from = i * columns.count + j;
        put_label(p, (rows.first + i) * p.W + columns.first + j, ws.winner[from], ws.best[from]);
      }
    }
  }
};

template <typename A>
int64_t workspace_size(const WindowParams<A>& p) {
  return Workspace<A>(p, nullptr).size;
}

template <typename A>
void tiles(const WindowParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> ws(p, memory);
  const int64_t across = (p.W + kPrunedTile - 1) / kPrunedTile;
  for (int64_t tile = begin; tile < end; ++tile) {
    Tile<A>(p, ws, tile / across * kPrunedTile, tile % across * kPrunedTile).run();
  }
}

template <typename A>
constexpr WindowTable<A> kTable = {workspace_size<A>, tiles<A>};

}  // namespace

template <typename A>
const WindowTable<A>& window_table() {
  return kTable<A>;
}
template const WindowTable<float>& window_table<float>();
template const WindowTable<double>& window_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
