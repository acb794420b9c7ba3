// contrastive_loss on the CPU. Compiled once per instruction set. A block of rows meets all columns; logits exist for
// one tile of it (forward) or for the block (backward). Sums of rows and columns are added in an order that depends on
// the shapes alone.
#include "../common/gemm.h"
#include "contrastive_loss.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

template <typename A>
int64_t padded(int64_t columns) {
  return packed_size<A>(1, columns);
}

template <typename A>
struct Tile {
  int64_t first, width;  // columns of a task
  Tile(const ContrastiveParams<A>& p, int64_t task) {
    const int64_t step = contrastive_plan(p.B, p.T, p.D).width;
    first = task * step;
    width = p.T - first < step ? p.T - first : step;
  }
};

template <typename A>
int64_t panel_size(const ContrastiveParams<A>& p) {
  const int64_t depth = p.D > kContrastiveChunk ? p.D : kContrastiveChunk;
  return kRows * depth;
}

template <typename A>
int64_t workspace_size(const ContrastiveParams<A>& p) {
  const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
  return plan.rows * plan.width + panel_size(p) + plan.width;
}

template <typename A>
int64_t packed_texts_size(const ContrastiveParams<A>& p) {
  const int64_t columns = padded<A>(p.T) * p.D, chunks = p.T * padded<A>(p.D);
  return columns > chunks ? columns : chunks;
}

template <typename A>
int64_t packed_rows_size(const ContrastiveParams<A>& p) {
  return contrastive_plan(p.B, p.T, p.D).rows * padded<A>(p.D);
}

// Texts as the columns of image text^T.
template <typename A>
void pack_columns(const ContrastiveParams<A>& p, int64_t begin, int64_t end, A* packed) {
  for (int64_t task = begin; task < end; ++task) {
    const Tile<A> t(p, task);
    pack_b(p.text + t.first * p.D, int64_t(1), p.D, p.D, t.width, packed + t.first * p.D);
  }
}

// Texts as the rows of d_logits text, in chunks of depth.
template <typename A>
void pack_chunks(const ContrastiveParams<A>& p, int64_t begin, int64_t end, A* packed) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t k0 = chunk * kContrastiveChunk, k = p.T - k0 < kContrastiveChunk ? p.T - k0 : kContrastiveChunk;
    pack_b(p.text + k0 * p.D, p.D, int64_t(1), k, p.D, packed + k0 * padded<A>(p.D));
  }
}

// Images of the block as the rows of d_logits^T image, slices of 64 channels.
template <typename A>
void pack_rows(const ContrastiveParams<A>& p, int64_t first, int64_t count, int64_t begin, int64_t end, A* packed) {
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t d = slice * 64, width = p.D - d < 64 ? p.D - d : 64;
    pack_b(p.image + first * p.D + d, p.D, int64_t(1), count, width, packed + d * count);
  }
}

template <typename A>
A maximum(A x, A y) {  // keeps a NaN
  return x > y || x != x ? x : y;
}

// s = image . text of a tile.
template <typename A>
void cosines(const ContrastiveParams<A>& p, int64_t first, int64_t count, const Tile<A>& t, const A* packed, A* s,
             A* panel) {
  gemm(count, t.width, p.D, p.image + first * p.D, p.D, int64_t(1), packed + t.first * p.D, s, t.width, false, panel);
}

// f(j, weight) for the positives of row i among the columns of a tile.
template <typename A, typename F>
void each_positive(const ContrastiveParams<A>& p, int64_t i, const Tile<A>& t, const F& f) {
  if (p.listed) {  // inside the list, whatever its starts hold
    const int64_t* texts = p.image_ids + p.B + 1;
    const int64_t begin = p.image_ids[i] < 0 ? 0 : p.image_ids[i], last = p.image_ids[i + 1];
    const int64_t end = last > p.pairs ? p.pairs : last;
    for (int64_t k = first_at_least(texts, begin, end, t.first); k < end && texts[k] < t.first + t.width;) {
      const int64_t j = texts[k];
      A weight = 0;
      for (; k < end && texts[k] == j; ++k) weight += p.pair_weights[k];
      if (weight != A(0) && j >= t.first) f(j - t.first, weight);
    }
  } else if (p.image_ids) {
    const int64_t id = p.image_ids[i], *ids = p.text_ids + t.first;
    for (int64_t j = 0; j < t.width; ++j) {
      if (ids[j] == id) f(j, A(1));
    }
  } else {
    const int64_t j = i + p.offset - t.first;
    if (j >= 0 && j < t.width) f(j, A(1));
  }
}

template <typename A>
void add_to_lse(A& top, A& sum, A other_top, A other_sum) {
  const A now = maximum(other_top, top);
  sum = (sum == A(0) ? A(0) : sum * exp_fast(top - now)) + other_sum * exp_fast(other_top - now);
  top = now;
}

template <typename A>
A softplus(A z) {
  return (z > A(0) ? z : A(0)) + log1p_fast(exp_fast(z > A(0) ? -z : z));
}

template <typename A>
A soft_label(A weight) {  // keeps a NaN
  return weight > A(1) ? A(1) : weight;
}

template <typename A>
void stats(const ContrastiveParams<A>& p, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
           A* row_partial, A* column_state, A* workspace) {
  const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
  A *z = workspace, *tops = z + plan.rows * plan.width, *panel = tops + plan.width;
  for (int64_t task = begin; task < end; ++task) {
    const Tile<A> t(p, task);
    cosines(p, first, count, t, packed, z, panel);
    for (int64_t i = 0; i < count * t.width; ++i) z[i] = p.scale * z[i] + p.bias;  // (1)
    for (int64_t j = 0; j < t.width; ++j) tops[j] = z[j];
    for (int64_t i = 0; i < count; ++i) {
      const A* row = z + i * t.width;
      A* out = row_partial + (task * plan.rows + i) * 2;
      if (p.sigmoid) {  // (4)
        A sum = 0;
        for (int64_t j = 0; j < t.width; ++j) sum += softplus(row[j]);
        each_positive(p, first + i, t, [&](int64_t j, A weight) { sum -= soft_label(weight) * row[j]; });
        out[0] = sum;
        continue;
      }
      A top = row[0], sum = 0, hits = 0, positives = 0;
      for (int64_t j = 0; j < t.width; ++j) {
        top = maximum(row[j], top);
        tops[j] = maximum(row[j], tops[j]);
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < t.width; ++j) sum += exp_fast(row[j] - top);
      out[0] = top, out[1] = sum;
      each_positive(p, first + i, t, [&](int64_t j, A weight) {
        hits += weight * row[j], positives += weight;
        p.columns[p.T + t.first + j] += weight * row[j], p.columns[2 * p.T + t.first + j] += weight;
      });
      // Rows of other tasks wait for finish_rows; positives are few and have an owner each.
      A* own = row_partial + plan.tasks * plan.rows * 2 + (task * plan.rows + i) * 2;
      own[0] = hits, own[1] = positives;
    }
    if (p.sigmoid) continue;
    A *top = column_state + t.first, *sum = column_state + p.T + t.first;
    for (int64_t j = 0; j < t.width; ++j) {
      const A now = maximum(tops[j], top[j]);
      sum[j] = sum[j] == A(0) ? A(0) : sum[j] * exp_fast(top[j] - now);
      top[j] = now;
    }
    for (int64_t i = 0; i < count; ++i) {
      const A* row = z + i * t.width;
      for (int64_t j = 0; j < t.width; ++j) sum[j] += exp_fast(row[j] - top[j]);
    }
  }
}

template <typename A>
void finish_rows(const ContrastiveParams<A>& p, int64_t first, int64_t count, const A* row_partial) {
  const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
  for (int64_t i = 0; i < count; ++i) {
    A top = 0, sum = 0, hits = 0, positives = 0;
    for (int64_t task = 0; task < plan.tasks; ++task) {
      const A* part = row_partial + (task * plan.rows + i) * 2;
      const A* own = part + plan.tasks * plan.rows * 2;
      if (p.sigmoid) {
        sum += part[0];
        continue;
      }
      if (task == 0) top = part[0];
      add_to_lse(top, sum, part[0], part[1]);
      hits += own[0], positives += own[1];
    }
    p.rows[first + i] = p.sigmoid ? sum : top + log_of(sum);
    p.rows[p.B + first + i] = hits;
    p.rows[2 * p.B + first + i] = p.sigmoid ? A(1) : positives;
  }
}

template <typename A>
void finish_columns(const ContrastiveParams<A>& p, const A* column_state) {
  for (int64_t j = 0; j < p.T; ++j) p.columns[j] = p.sigmoid ? A(0) : column_state[j] + log_of(column_state[p.T + j]);
}

template <typename A>
void logits(const ContrastiveParams<A>& p, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
            A* d_logits, double* sums, A* workspace) {
  const ContrastivePlan plan = contrastive_plan(p.B, p.T, p.D);
  A *s = workspace, *weights = s + plan.rows * plan.width, *panel = weights + plan.width;
  for (int64_t task = begin; task < end; ++task) {
    const Tile<A> t(p, task);
    cosines(p, first, count, t, packed, s, panel);
    const A* lse = p.columns + t.first;
    const A* found = p.columns + 2 * p.T + t.first;
    for (int64_t j = 0; j < t.width; ++j) weights[j] = p.grad * p.column_weight[t.first + j];
    double d_scale = 0, d_bias = 0;
    for (int64_t i = 0; i < count; ++i) {
      const A* row = s + i * t.width;
      A* out = d_logits + i * p.T + t.first;
      const A weight = p.grad * p.row_weight[first + i], row_lse = p.rows[first + i];
      if (p.sigmoid) {  // (6)
        for (int64_t j = 0; j < t.width; ++j) {
          const A z = p.scale * row[j] + p.bias, e = exp_fast(z > 0 ? -z : z);
          out[j] = weight * (z > 0 ? A(1) : e) / (A(1) + e);
        }
        each_positive(p, first + i, t, [&](int64_t j, A label) { out[j] -= soft_label(label) * weight; });
      } else {  // (5)
        for (int64_t j = 0; j < t.width; ++j) {
          const A z = p.scale * row[j] + p.bias;
          out[j] = weight * exp_fast(z - row_lse) + weights[j] * exp_fast(z - lse[j]);
        }
        const A share = weight == A(0) ? A(0) : weight / p.rows[2 * p.B + first + i];
        each_positive(p, first + i, t, [&](int64_t j, A label) {
          out[j] -= label * (share + (weights[j] == A(0) ? A(0) : weights[j] / found[j]));
        });
      }
      A with_s = 0, sum = 0;
#pragma omp simd reduction(+ : with_s, sum)
      for (int64_t j = 0; j < t.width; ++j) {
        with_s += out[j] * row[j];
        sum += out[j];
        out[j] *= p.scale;
      }
      d_scale += static_cast<double>(with_s), d_bias += static_cast<double>(sum);
    }
    sums[task * 2] = d_scale, sums[task * 2 + 1] = d_bias;
  }
}

template <typename A>
void image(const ContrastiveParams<A>& p, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
           const A* d_logits, A* workspace) {
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t d = slice * 64, width = p.D - d < 64 ? p.D - d : 64;
    for (int64_t k0 = 0; k0 < p.T; k0 += kContrastiveChunk) {
      const int64_t k = p.T - k0 < kContrastiveChunk ? p.T - k0 : kContrastiveChunk;
      gemm(count, width, k, d_logits + k0, p.T, int64_t(1), packed + k0 * padded<A>(p.D) + d * k,
           p.grad_image + first * p.D + d, p.D, k0 > 0, workspace);
    }
  }
}

template <typename A>
void text(const ContrastiveParams<A>& p, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
          const A* d_logits, A* workspace) {
  for (int64_t task = begin; task < end; ++task) {
    const Tile<A> t(p, task);
    gemm(t.width, p.D, count, d_logits + t.first, int64_t(1), p.T, packed, p.grad_text + t.first * p.D, p.D, first > 0,
         workspace);
  }
}

template <typename A>
constexpr ContrastiveTable<A> kTable = {
    workspace_size<A>, packed_texts_size<A>, packed_rows_size<A>, pack_columns<A>, pack_chunks<A>, pack_rows<A>,
    stats<A>,          finish_rows<A>,       finish_columns<A>,   logits<A>,       image<A>,       text<A>};

}  // namespace

template <typename A>
const ContrastiveTable<A>& contrastive_table() {
  return kTable<A>;
}
template const ContrastiveTable<float>& contrastive_table<float>();
template const ContrastiveTable<double>& contrastive_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
