// upsample_argmax on the CPU. Compiled once per instruction set. A task owns the output rows between two rows of
// samples: it finds the classes that can win in each cell, (3), and interpolates only those, row by row.
#include "../common/simd.h"
#include "../common/workspace.h"
#include "upsample_argmax.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

template <typename A>
struct Workspace {
  A *floor, *left, *right, *best, *low, *high;  // [w], [C], [C], then [W] each
  int32_t *count, *list, *winner, *cell;        // [w], [w, C], then [W] each
  int64_t size;

  Workspace(const UpsampleParams<A>& p, A* base) {
    Arena<A> arena(base);
    floor = arena.template take<A>(p.w);
    left = arena.template take<A>(p.C);
    right = arena.template take<A>(p.C);
    best = arena.template take<A>(p.W);
    low = arena.template take<A>(p.W);
    high = arena.template take<A>(p.W);
    count = arena.template take<int32_t>(p.w);
    list = arena.template take<int32_t>(p.w * p.C);
    winner = arena.template take<int32_t>(p.W);
    cell = arena.template take<int32_t>(p.W);
    size = arena.size();
  }
};

template <typename A>
int64_t workspace_size(const UpsampleParams<A>& p) {
  return Workspace<A>(p, nullptr).size;
}

// The candidates (3) of the cells between two rows of samples; f(corners' least, corners' largest) of class c.
template <typename A>
void candidates(const UpsampleParams<A>& p, int64_t b, int64_t y0, int64_t y1, Workspace<A>& ws) {
  const A* image = p.logits + b * p.C * p.h * p.w;
  auto cells = [&](int64_t c, const auto& f) {
    const A *top = image + (c * p.h + y0) * p.w, *bottom = image + (c * p.h + y1) * p.w;
    const A add = p.bias ? p.bias[c] : A(0);
    for (int64_t x = 0; x + 1 < p.w; ++x) {
      f(x, smaller(smaller(top[x], top[x + 1]), smaller(bottom[x], bottom[x + 1])) + add,
        larger(larger(top[x], top[x + 1]), larger(bottom[x], bottom[x + 1])) + add);
    }
    const int64_t x = p.w - 1;
    f(x, smaller(top[x], bottom[x]) + add, larger(top[x], bottom[x]) + add);
  };
  for (int64_t x = 0; x < p.w; ++x) ws.floor[x] = -static_cast<A>(__builtin_inf()), ws.count[x] = 0;
  for (int64_t c = 0; c < p.C; ++c) {
    cells(c, [&](int64_t x, A least, A) { ws.floor[x] = larger(ws.floor[x], least); });
  }
  for (int64_t c = 0; c < p.C; ++c) {
    cells(c, [&](int64_t x, A, A most) {
      ws.list[x * p.C + ws.count[x]] = static_cast<int32_t>(c);
      ws.count[x] += most < ws.floor[x] ? 0 : 1;  // NaN stays: a cell must have a class
    });
  }
}

template <typename A, typename T>
void store_winners(const UpsampleParams<A>& p, int64_t at, const Workspace<A>& ws) {
  T* out = static_cast<T*>(p.out) + at;
  for (int64_t x = 0; x < p.W; ++x) out[x] = static_cast<T>(ws.winner[x]);
}

template <typename A>
void store(const UpsampleParams<A>& p, int64_t at, const Workspace<A>& ws) {
  if (p.has_threshold || p.labels || p.value) {
    for (int64_t x = 0; x < p.W; ++x) put_label(p, at + x, ws.winner[x], ws.best[x]);
  } else if (p.type == LabelType::int64) {
    store_winners<A, int64_t>(p, at, ws);
  } else if (p.type == LabelType::int16) {
    store_winners<A, int16_t>(p, at, ws);
  } else {
    store_winners<A, uint8_t>(p, at, ws);
  }
}

// One output row of a cell: columns [x0, x1). The rule (4) once more, for the row: values are straight between its
// ends.
template <typename A>
void row_of_cell(const UpsampleParams<A>& p, int64_t b, const Between<A>& y, int64_t cell, int64_t x0, int64_t x1,
                 Workspace<A>& ws) {
  const int64_t right = cell + 1 < p.w ? cell + 1 : cell, plane = p.h * p.w;
  const int32_t* list = ws.list + cell * p.C;
  const A *top = p.logits + b * p.C * plane + y.low * p.w, *bottom = p.logits + b * p.C * plane + y.high * p.w;
  A floor = -static_cast<A>(__builtin_inf());
  for (int64_t k = 0; k < ws.count[cell]; ++k) {
    const int64_t at = list[k] * plane;
    const A add = p.bias ? p.bias[list[k]] : A(0);
    ws.left[k] = weighted(y.to_low, top[at + cell]) + weighted(y.to_high, bottom[at + cell]) + add;
    ws.right[k] = weighted(y.to_low, top[at + right]) + weighted(y.to_high, bottom[at + right]) + add;
    floor = larger(floor, smaller(ws.left[k], ws.right[k]));
  }
  int64_t found = 0, last = 0;
  for (int64_t k = 0; k < ws.count[cell]; ++k) {
    if (larger(ws.left[k], ws.right[k]) < floor) continue;
    ++found, last = k;
  }
  if (found == 1 && !p.value && !p.has_threshold) {
    for (int64_t x = x0; x < x1; ++x) ws.winner[x] = list[last];
    return;
  }
  bool first = true;
  for (int64_t k = 0; k < ws.count[cell]; ++k) {
    const A left = ws.left[k], other = ws.right[k];
    if (larger(left, other) < floor) continue;
    const int32_t c = list[k];
    const bool finite = left - left == A(0) && other - other == A(0);
    if (finite && first) {
      for (int64_t x = x0; x < x1; ++x) ws.best[x] = ws.low[x] * left + ws.high[x] * other, ws.winner[x] = c;
    } else if (finite) {
      for (int64_t x = x0; x < x1; ++x) {
        const A value = ws.low[x] * left + ws.high[x] * other;
        ws.winner[x] = value > ws.best[x] ? c : ws.winner[x];
        ws.best[x] = value > ws.best[x] ? value : ws.best[x];
      }
    } else {
      for (int64_t x = x0; x < x1; ++x) {
        const A value = weighted(ws.low[x], left) + weighted(ws.high[x], other);
        if (first || value > ws.best[x]) ws.best[x] = value, ws.winner[x] = c;
      }
    }
    first = false;
  }
}

template <typename A>
void rows(const UpsampleParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> ws(p, memory);
  for (int64_t x = 0; x < p.W; ++x) {
    const Between<A> at = between<A>(x, p.w, p.W);
    ws.low[x] = at.to_low, ws.high[x] = at.to_high, ws.cell[x] = static_cast<int32_t>(at.low);
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.h, sample = task % p.h;
    int64_t Y = first_output<A>(sample, p.h, p.H);  // the output rows of this lower sample are neighbours
    bool ready = false;
    for (; Y < p.H; ++Y) {
      const Between<A> y = between<A>(Y, p.h, p.H);
      if (y.low != sample) break;
      if (!ready) candidates(p, b, y.low, y.high, ws);
      ready = true;
      for (int64_t X = 0; X < p.W;) {
        const int64_t cell = ws.cell[X], first = X;
        while (X < p.W && ws.cell[X] == cell) ++X;
        row_of_cell(p, b, y, cell, first, X, ws);
      }
      store(p, (b * p.H + Y) * p.W, ws);
    }
  }
}

template <typename A>
constexpr UpsampleTable<A> kTable = {workspace_size<A>, rows<A>};

}  // namespace

template <typename A>
const UpsampleTable<A>& upsample_table() {
  return kTable<A>;
}
template const UpsampleTable<float>& upsample_table<float>();
template const UpsampleTable<double>& upsample_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
