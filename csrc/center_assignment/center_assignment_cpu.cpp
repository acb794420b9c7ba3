// center_assignment on the CPU. Compiled once per instruction set. One task owns a slot of consecutive tokens of one
// image: keys and values are read once, partial sums of the slots are added in order, so the bits do not depend on the
// threads.
#include "../common/philox.h"
#include "../common/rows.h"
#include "center_assignment.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

constexpr int kBlock = 4;  // tokens walked together, so that a center is read once for all of them

// Scratch of one thread.
template <typename A>
struct Workspace {
  A *queries, *grad, *keys, *values, *out, *raw, *weights, *z, *y, *ds, *soft, *rho;
  int64_t size = 0;

  A* take(A* base, int64_t count) {
    A* at = base ? base + size : nullptr;
    size += (count + 31) / 32 * 32;
    return at;
  }
  Workspace(const CenterParams<A>& p, A* base) {
    queries = take(base, p.G * p.D);
    grad = take(base, p.G * p.E);
    keys = take(base, kBlock * p.D);
    values = take(base, kBlock * p.E);
    out = take(base, p.D > p.E ? p.D : p.E);
    raw = take(base, kBlock * p.G);
    weights = take(base, kBlock * p.G);
    z = take(base, kBlock * p.G);
    y = take(base, kBlock * p.G);
    ds = take(base, kBlock * p.G);
    soft = take(base, p.G);
    rho = take(base, p.G);
  }
};

// Rows whose elements are not neighbours are gathered through the same converter, one element at a time.
template <typename A>
void load_strided(Type type, const void* base, int64_t offset, int64_t stride, int64_t count, A* out) {
  if (stride == 1) return load_row(type, base, offset, count, out);
  for (int64_t i = 0; i < count; ++i) load_row(type, base, offset + i * stride, int64_t(1), out + i);
}

template <typename A>
bool kept(const CenterParams<A>& p, int64_t b, int64_t l) {
  return !p.mask || p.mask[b * p.mask_strides[0] + l * p.mask_strides[1]];
}

template <typename A>
constexpr Type kOwnType = sizeof(A) == 8 ? Type::float64 : Type::float32;

// Four rows from l on, in place where they can be read as they are; masked and missing ones are zero.
template <typename A>
void load_block(const CenterParams<A>& p, const void* base, const int64_t (&strides)[3], int64_t b, int64_t l,
                int64_t end, int64_t width, A* buffer, const A* (&rows)[kBlock], bool (&keep)[kBlock]) {
  for (int i = 0; i < kBlock; ++i) {
    A* copy = buffer + i * width;
    rows[i] = copy;
    keep[i] = l + i < end && kept(p, b, l + i);
    const int64_t offset = b * strides[0] + (l + i) * strides[1];
    if (!keep[i]) {
      memset(copy, 0, width * sizeof(A));
    } else if (strides[2] == 1 && p.type == kOwnType<A>) {
      rows[i] = static_cast<const A*>(base) + offset;
    } else {
      load_strided(p.type, base, offset, strides[2], width, copy);
    }
  }
}

template <typename A>
void load_queries(const CenterParams<A>& p, int64_t b, Workspace<A>& w) {
  for (int64_t g = 0; g < p.G; ++g) {
    load_strided(p.type, p.queries, b * p.query_strides[0] + g * p.query_strides[1], p.query_strides[2], p.D,
                 w.queries + g * p.D);
  }
}

template <typename A>
A score_factor(const CenterParams<A>& p, int64_t b, int64_t l) {
  return p.key_scale ? p.scale * p.key_scale[b * p.L + l] : p.scale;
}

// Scores z, with noise and temperature y, of four tokens: equations (1) and (2) before the softmax.
template <typename A>
void score(const CenterParams<A>& p, int64_t b, int64_t l, const A* const (&keys)[kBlock], const bool (&keep)[kBlock],
           Workspace<A>& w) {
  dots4(keys, w.queries, p.G, p.D, w.raw);
  for (int i = 0; i < kBlock; ++i) {
    if (!keep[i]) continue;
    const A* raw = w.raw + i * p.G;
    A *z = w.z + i * p.G, *y = w.y + i * p.G;
    const A factor = score_factor(p, b, l + i);
    const int64_t first = (b * p.L + l + i) * p.G;
    for (int64_t g = 0; g < p.G; ++g) {
      z[g] = factor * raw[g] + (p.center_bias ? p.center_bias[b * p.G + g] : A(0));
      A noise = 0;
      if (p.noise) noise = p.noise[b * p.noise_strides[0] + g * p.noise_strides[1] + (l + i) * p.noise_strides[2]];
      if (p.rng) noise = static_cast<A>(gumbel_from_bits(philox_bits(p.rng[0], p.rng[1], first + g)));
      y[g] = (z[g] + noise) / p.tau;
    }
  }
}

template <typename A>
int64_t first_maximum(const A* y, int64_t G) {
  int64_t best = 0;
  for (int64_t g = 1; g < G; ++g) {
    if (y[g] > y[best] || (y[g] != y[g] && y[best] == y[best])) best = g;
  }
  return best;
}

template <typename A>
void softmax(const A* y, int64_t G, A* out) {
  const A top = y[first_maximum(y, G)];
  A sum = 0;
  for (int64_t g = 0; g < G; ++g) {
    out[g] = exp_fast(y[g] - top);
    sum += out[g];
  }
  for (int64_t g = 0; g < G; ++g) out[g] /= sum;
}

template <typename A>
A divisor(const CenterParams<A>& p, A count) {  // (4)
  if (p.normalizer == Normalizer::sum) return A(1);
  if (p.normalizer == Normalizer::mean_plus_one) return count + A(1);
  return count < A(1) ? A(1) : count;
}

template <typename A>
A nan_of() {
  return static_cast<A>(__builtin_nan(""));
}

// A center's sum that is not finite leaves no other center a number in its channel: 0 of the definition's one-hot times
// infinity is none.
template <typename A>
void spread_to_others(A* sums, int64_t G, int64_t E) {
  A waste = 0;
#pragma omp simd reduction(+ : waste)
  for (int64_t i = 0; i < G * E; ++i) waste += A(0) * sums[i];
  if (waste == A(0)) return;
  for (int64_t e = 0; e < E; ++e) {
    int64_t bad = 0;
    for (int64_t g = 0; g < G; ++g) bad += sums[g * E + e] - sums[g * E + e] != A(0);
    for (int64_t g = 0; g < G; ++g) {
      const bool own = sums[g * E + e] - sums[g * E + e] != A(0);
      if (bad > own) sums[g * E + e] = nan_of<A>();
    }
  }
}

template <typename A>
void forward_slots(const CenterParams<A>& p, int64_t begin, int64_t end, A* partial, A* memory) {
  Workspace<A> w(p, memory);
  const int64_t slots = center_slots(p.L), size = p.G * (p.E + 1);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / slots, l0 = t % slots * kCenterSlot, l1 = l0 + kCenterSlot < p.L ? l0 + kCenterSlot : p.L;
    A *sums = partial + t * size, *counts = sums + p.G * p.E;
    memset(sums, 0, size * sizeof(A));
    load_queries(p, b, w);
    const A *keys[kBlock], *values[kBlock];
    bool keep[kBlock];
    for (int64_t l = l0; l < l1; l += kBlock) {
      load_block(p, p.keys, p.key_strides, b, l, l1, p.D, w.keys, keys, keep);
      load_block(p, p.values, p.value_strides, b, l, l1, p.E, w.values, values, keep);
      score(p, b, l, keys, keep, w);
      memset(w.ds, 0, kBlock * p.G * sizeof(A));  // the weights a
      for (int i = 0; i < kBlock && l + i < l1; ++i) {
        const int64_t best = keep[i] ? first_maximum(w.y + i * p.G, p.G) : -1;
        p.index[b * p.L + l + i] = best;
        if (p.soft) {  // (5)
          if (keep[i]) softmax(w.z + i * p.G, p.G, w.soft);
          for (int64_t g = 0; g < p.G; ++g) p.soft[(b * p.G + g) * p.L + l + i] = keep[i] ? w.soft[g] : A(0);
        }
        if (!keep[i]) continue;
        if (p.hard) {
          add_scaled(sums + best * p.E, A(1), values[i], p.E);
          counts[best] += A(1);
          const A top = w.y[i * p.G + best];
          if (top - top != A(0)) {  // the softmax of this token is NaN, and with it the straight-through weight of all
            for (int64_t k = 0; k < size; ++k) sums[k] = nan_of<A>();
          }
        } else {
          softmax(w.y + i * p.G, p.G, w.ds + i * p.G);
          for (int64_t g = 0; g < p.G; ++g) counts[g] += w.ds[i * p.G + g];
        }
      }
      if (!p.hard) add_outer4(values, w.ds, p.G, p.E, sums);
    }
  }
}

template <typename A>
void finish_forward(const CenterParams<A>& p, int64_t begin, int64_t end, const A* partial) {
  const int64_t slots = center_slots(p.L), size = p.G * (p.E + 1);
  for (int64_t b = begin; b < end; ++b) {
    A* pooled = p.pooled + b * p.G * p.E;
    for (int64_t g = 0; g < p.G; ++g) {
      A* out = pooled + g * p.E;
      memset(out, 0, p.E * sizeof(A));
      A count = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const A* sums = partial + (b * slots + slot) * size;
        add_scaled(out, A(1), sums + g * p.E, p.E);
        count += sums[p.G * p.E + g];
      }
      p.count[b * p.G + g] = count;
    }
    if (p.hard) spread_to_others(pooled, p.G, p.E);
    for (int64_t g = 0; g < p.G; ++g) {
      const A n = divisor(p, p.count[b * p.G + g]);
      for (int64_t e = 0; e < p.E; ++e) pooled[g * p.E + e] /= n;
    }
  }
}

// (9) onto w.out.
template <typename A>
void add_value_gradient(const CenterParams<A>& p, int64_t token, const A* weights, Workspace<A>& w) {
  if (p.hard) return add_scaled(w.out, A(1), w.grad + p.index[token] * p.E, p.E);
  for (int64_t g = 0; g < p.G; ++g) add_scaled(w.out, weights[g], w.grad + g * p.E, p.E);
}

template <typename A>
void backward_slots(const CenterParams<A>& p, int64_t begin, int64_t end, A* partial, A* memory) {
  Workspace<A> w(p, memory);
  const int64_t slots = center_slots(p.L), size = p.G * (p.D + 1);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / slots, l0 = t % slots * kCenterSlot, l1 = l0 + kCenterSlot < p.L ? l0 + kCenterSlot : p.L;
    A* dq = p.grad_queries ? partial + t * size : nullptr;
    A* d_bias = p.grad_bias ? partial + t * size + p.G * p.D : nullptr;
    if (dq) memset(dq, 0, p.G * p.D * sizeof(A));
    if (d_bias) memset(d_bias, 0, p.G * sizeof(A));
    load_queries(p, b, w);
    for (int64_t g = 0; g < p.G; ++g) {  // p_g / n_g, and rho_g / n_g
      const A* grad = p.grad + (b * p.G + g) * p.E;
      const A count = p.count[b * p.G + g], inverse = A(1) / divisor(p, count);
      for (int64_t e = 0; e < p.E; ++e) w.grad[g * p.E + e] = grad[e] * inverse;
      const bool constant = p.normalizer == Normalizer::sum || (p.normalizer == Normalizer::mean && count < A(1));
      w.rho[g] = constant ? A(0) : dot(p.pooled + (b * p.G + g) * p.E, w.grad + g * p.E, p.E);
      if (p.grad_count) w.rho[g] -= p.grad_count[b * p.G + g];
    }
    const A *keys[kBlock], *values[kBlock];
    bool keep[kBlock];
    for (int64_t l = l0; l < l1; l += kBlock) {
      load_block(p, p.keys, p.key_strides, b, l, l1, p.D, w.keys, keys, keep);
      load_block(p, p.values, p.value_strides, b, l, l1, p.E, w.values, values, keep);
      dots4(values, w.grad, p.G, p.E, w.ds);
      score(p, b, l, keys, keep, w);
      for (int i = 0; i < kBlock && l + i < l1; ++i) {
        const int64_t at = b * p.L + l + i;
        A *ds = w.ds + i * p.G, *soft = w.y + i * p.G;
        const A* combined = w.out;
        if (!keep[i]) {
          memset(w.out, 0, (p.D > p.E ? p.D : p.E) * sizeof(A));
          if (p.grad_keys) store_row(p.type, p.grad_keys, at * p.D, p.D, combined);
          if (p.grad_values) store_row(p.type, p.grad_values, at * p.E, p.E, combined);
          if (p.grad_scale) p.grad_scale[at] = 0;
          continue;
        }
        softmax(soft, p.G, soft);
        A mean = 0;
        for (int64_t g = 0; g < p.G; ++g) {
          ds[g] -= w.rho[g];  // (6)
          mean += soft[g] * ds[g];
        }
        if (p.shared && !p.hard) memcpy(w.weights + i * p.G, soft, p.G * sizeof(A));
        if (p.grad_values) {  // (9)
          if (p.hard && soft[0] == soft[0]) {
            combined = w.grad + p.index[at] * p.E;
          } else {  // or a softmax of NaN, which goes on being one
            combine(soft, w.grad, p.G, p.E, w.out);
          }
          store_row(p.type, p.grad_values, at * p.E, p.E, combined);
        }
        for (int64_t g = 0; g < p.G; ++g) ds[g] = soft[g] * (ds[g] - mean) / p.tau;  // (7)
        if (p.grad_soft) {
          softmax(w.z + i * p.G, p.G, w.soft);
          A inner = 0;
          for (int64_t g = 0; g < p.G; ++g) inner += w.soft[g] * p.grad_soft[(b * p.G + g) * p.L + l + i];
          for (int64_t g = 0; g < p.G; ++g) ds[g] += w.soft[g] * (p.grad_soft[(b * p.G + g) * p.L + l + i] - inner);
        }
        for (int64_t g = 0; d_bias && g < p.G; ++g) d_bias[g] += ds[g];
        if (p.grad_scale) p.grad_scale[at] = p.scale * dot(static_cast<const A*>(ds), w.raw + i * p.G, p.G);  // (10)
        const A factor = score_factor(p, b, l + i);
        for (int64_t g = 0; g < p.G; ++g) ds[g] *= factor;
        if (p.grad_keys) {  // (8)
          combine(ds, w.queries, p.G, p.D, w.out);
          if (p.shared) add_value_gradient(p, at, static_cast<const A*>(w.weights + i * p.G), w);
          store_row(p.type, p.grad_keys, at * p.D, p.D, static_cast<const A*>(w.out));
        }
      }
      for (int i = 0; i < kBlock; ++i) {
        if (!keep[i]) memset(w.ds + i * p.G, 0, p.G * sizeof(A));
      }
      if (dq) add_outer4(keys, w.ds, p.G, p.D, dq);
    }
  }
}

template <typename A>
void finish_backward(const CenterParams<A>& p, int64_t begin, int64_t end, A* partial) {
  const int64_t slots = center_slots(p.L);
  const int64_t wide = p.G * p.D, size = wide + p.G;
  for (int64_t b = begin; b < end; ++b) {
    A* sum = partial + b * slots * size;
    for (int64_t slot = 1; slot < slots; ++slot) {
      if (p.grad_queries) add_scaled(sum, A(1), sum + slot * size, wide);
      if (p.grad_bias) add_scaled(sum + wide, A(1), sum + slot * size + wide, p.G);
    }
    if (p.grad_queries) store_row(p.type, p.grad_queries, b * wide, wide, static_cast<const A*>(sum));
    for (int64_t g = 0; p.grad_bias && g < p.G; ++g) p.grad_bias[b * p.G + g] = sum[wide + g];  // (10)
  }
}

template <typename A>
int64_t workspace_size(const CenterParams<A>& p) {
  return Workspace<A>(p, nullptr).size;
}

template <typename A>
constexpr CenterTable<A> kTable = {workspace_size<A>, forward_slots<A>, finish_forward<A>, backward_slots<A>,
                                   finish_backward<A>};

}  // namespace

template <typename A>
const CenterTable<A>& center_table() {
  return kTable<A>;
}
template const CenterTable<float>& center_table<float>();
template const CenterTable<double>& center_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
