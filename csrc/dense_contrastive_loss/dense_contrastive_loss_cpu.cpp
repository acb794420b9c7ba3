// dense_contrastive_loss on the CPU. Compiled once per instruction set. Pixels are read once, in blocks; every worker
// keeps its best candidates of each text in a heap. The order of candidates is total, so the merged lists do not depend
// on the workers.
#include "../common/gemm.h"
#include "../common/philox.h"
#include "../common/rows.h"
#include "dense_contrastive_loss.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

constexpr int64_t kPixels = 48;  // of a block

template <typename A>
A infinity() {
  return static_cast<A>(__builtin_inf());
}

template <typename A>
bool worse(const Selected<A>& x, const Selected<A>& y) {
  return x.key < y.key || (x.key == y.key && x.index > y.index);
}

// The worst of a heap of `length` is its first element; the one there is moved to its place.
template <typename A>
void sift_down(Selected<A>* heap, int64_t length) {
  const Selected<A> moving = heap[0];
  int64_t at = 0;
  for (int64_t child = 1; child < length; child = 2 * at + 1) {
    if (child + 1 < length && worse(heap[child + 1], heap[child])) ++child;
    if (!worse(heap[child], moving)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moving;
}

template <typename A>
void push(Selected<A>* heap, int64_t& length, int64_t capacity, const Selected<A>& entry) {
  if (length < capacity) {
    int64_t at = length++;
    for (; at > 0 && worse(entry, heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = entry;
  } else if (worse(heap[0], entry)) {
    heap[0] = entry;
    sift_down(heap, length);
  }
}

// Best first.
template <typename A>
void sort_heap(Selected<A>* heap, int64_t length) {
  for (; length > 1; --length) {
    const Selected<A> worst = heap[0];
    heap[0] = heap[length - 1];
    sift_down(heap, length - 1);
    heap[length - 1] = worst;
  }
}

template <typename A>
void write(const Selected<A>* sorted, int64_t length, int64_t skip, int64_t wanted, int64_t* out) {
  for (int64_t k = 0; k < wanted; ++k) out[k] = k + skip < length ? sorted[k + skip].index : -1;
}

template <typename A>
constexpr Type kOwnType = sizeof(A) == 8 ? Type::float64 : Type::float32;

// A pixel in A, in place where it can be read as it is.
template <typename A>
const A* pixel(const DenseParams<A>& p, int64_t index, A* buffer) {
  const int64_t offset = index / p.N * p.strides[0] + index % p.N * p.strides[1];
  if (p.strides[2] == 1) {
    if (p.type == kOwnType<A>) return static_cast<const A*>(p.pixels) + offset;
    load_row(p.type, p.pixels, offset, p.D, buffer);
  } else {
    for (int64_t d = 0; d < p.D; ++d) load_row(p.type, p.pixels, offset + d * p.strides[2], int64_t(1), buffer + d);
  }
  return buffer;
}

// 1 / max(|u|, eps), as torch's normalize.
template <typename A>
A inverse_norm(const A* u, int64_t D) {
  const A norm = norm_of(u, D);
  return A(1) / (norm < A(1e-12) ? A(1e-12) : norm);
}

template <typename A>
int64_t workspace_size(const DenseParams<A>& p) {
  return kPixels * (p.D + p.T + 1) + kRows * p.D + 2 * p.T + 2 * p.D;
}

template <typename A>
int64_t packed_texts_size(const DenseParams<A>& p) {
  return packed_size<A>(p.D, p.T);
}

template <typename A>
void pack(const DenseParams<A>& p, A* packed) {
  pack_b(p.texts, int64_t(1), p.D, p.D, p.T, packed);
}

// (2); lowest[j] is the similarity of the last one, infinity where there is none.
template <typename A>
void positives(const DenseParams<A>& p, int64_t begin, int64_t end, Selected<A>* lists, A* lowest, A* workspace) {
  for (int64_t j = begin; j < end; ++j) {
    Selected<A>* heap = lists + j * p.k_pos;
    int64_t length = 0;
    for (int64_t i = 0; i < p.B; ++i) {
      if (!own(p, i, j)) continue;
      for (int64_t n = 0; n < p.N; ++n) {
        const A* u = pixel(p, i * p.N + n, workspace);
        const A s = dot(u, p.texts + j * p.D, p.D) * inverse_norm(u, p.D);
        push(heap, length, p.k_pos, {s != s ? infinity<A>() : s, i * p.N + n});
      }
    }
    sort_heap(heap, length);
    lowest[j] = length > 0 ? heap[length - 1].key : infinity<A>();
    write(heap, length, int64_t(0), p.k_pos, p.positive + j * p.k_pos);
  }
}

// The key of (3) by which pixel `index` stands in the order of text j; -infinity: not eligible.
template <typename A>
A key_of(const DenseParams<A>& p, int64_t j, int64_t index, A s, const A* lowest) {
  if (p.sampling == Sampling::semi) return s < lowest[j] && s >= lowest[j] - p.margin ? s : -infinity<A>();
  if (p.sampling == Sampling::topk) return s != s ? infinity<A>() : s;
  const uint32_t bits = philox_bits(p.rng[0], p.rng[1], j * p.B * p.N + index);
  if (p.sampling == Sampling::random) return static_cast<A>(uniform_from_bits(bits));
  const A key = s * p.inverse_temperature + static_cast<A>(gumbel_from_bits(bits));
  return key != key ? infinity<A>() : key;
}

template <typename A>
void negatives(const DenseParams<A>& p, int64_t begin, int64_t end, const A* packed, const A* lowest,
               Selected<A>* lists, int64_t* lengths, A* workspace) {
  const int64_t capacity = p.k_neg + p.skip;
  A *rows = workspace, *s = rows + kPixels * p.D, *inverse = s + kPixels * p.T, *panel = inverse + kPixels;
  A* threshold = panel + kRows * p.D;
  const bool direct = p.sampling == Sampling::topk;  // the key is the similarity: most pixels fall to one comparison
  for (int64_t j = 0; j < p.T; ++j) lengths[j] = 0, threshold[j] = -infinity<A>();
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t n0 = 0; n0 < p.N; n0 += kPixels) {
      const int64_t count = p.N - n0 < kPixels ? p.N - n0 : kPixels, first = i * p.N + n0;
      const A* block = rows;
      int64_t pitch = p.D;
      if (p.strides[2] == 1 && p.type == kOwnType<A>) {
        block = pixel(p, first, rows), pitch = p.strides[1];
      } else {
        for (int64_t r = 0; r < count; ++r) pixel(p, first + r, rows + r * p.D);
      }
      for (int64_t r = 0; r < count; ++r) inverse[r] = inverse_norm(block + r * pitch, p.D);
      gemm(count, p.T, p.D, block, pitch, int64_t(1), packed, s, p.T, false, panel);
      for (int64_t j = 0; j < p.T; ++j) {
        if (!own(p, i, j)) continue;  // (3): never the text's own images
        for (int64_t r = 0; r < count; ++r) s[r * p.T + j] = -infinity<A>();
      }
      for (int64_t r = 0; r < count; ++r) {
        A* row = s + r * p.T;
        int any = !direct;
        for (int64_t j = 0; j < p.T; ++j) {
          row[j] *= inverse[r];
          any |= !(row[j] <= threshold[j]);
        }
        if (!any) continue;
        for (int64_t j = 0; j < p.T; ++j) {
          if (row[j] == -infinity<A>() || (direct && row[j] <= threshold[j])) continue;
          const A key = key_of(p, j, first + r, row[j], lowest);
          if (key <= threshold[j]) continue;
          Selected<A>* heap = lists + j * capacity;
          push(heap, lengths[j], capacity, {key, first + r});
          if (lengths[j] == capacity) threshold[j] = heap[0].key;
        }
      }
    }
  }
}

template <typename A>
void merge(const DenseParams<A>& p, int64_t begin, int64_t end, int64_t workers, Selected<A>* lists,
           const int64_t* lengths) {
  const int64_t capacity = p.k_neg + p.skip;
  for (int64_t j = begin; j < end; ++j) {
    Selected<A>* heap = lists + j * capacity;
    int64_t length = lengths[j];
    for (int64_t w = 1; w < workers; ++w) {
      const Selected<A>* other = lists + (w * p.T + j) * capacity;
      for (int64_t k = 0; k < lengths[w * p.T + j]; ++k) push(heap, length, capacity, other[k]);
    }
    sort_heap(heap, length);
    write(heap, length, p.skip, p.k_neg, p.negative + j * p.k_neg);
  }
}

template <typename A>
void gather(const DenseParams<A>& p, int64_t begin, int64_t end, A* workspace) {
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t k = 0; k < p.K; ++k) {
      const int64_t index = p.index[j * p.K + k];
      A* unit = k < p.rows ? p.unit + (j * p.rows + k) * p.D : nullptr;
      p.similarity[j * p.K + k] = 0;
      if (unit) memset(unit, 0, p.D * sizeof(A));
      if (index < 0) continue;
      const A* u = pixel(p, index, workspace);
      const A inverse = inverse_norm(u, p.D);
      p.similarity[j * p.K + k] = dot(u, p.texts + j * p.D, p.D) * inverse;
      if (unit) add_scaled(unit, inverse, u, p.D);
    }
  }
}

template <typename A>
void texts(const DenseParams<A>& p, int64_t begin, int64_t end, A* workspace) {  // (9)
  for (int64_t j = begin; j < end; ++j) {
    A* out = p.grad_texts + j * p.D;
    memset(out, 0, p.D * sizeof(A));
    for (int64_t k = 0; p.grad_similarity && k < p.K; ++k) {
      const int64_t index = p.index[j * p.K + k];
      if (index < 0) continue;
      const A* u = pixel(p, index, workspace);
      add_scaled(out, p.grad_similarity[j * p.K + k] * inverse_norm(u, p.D), u, p.D);
    }
  }
}

// (8). A pixel belongs to the range in which its first entry lies, so that it has one owner.
template <typename A>
void pixels(const DenseParams<A>& p, int64_t begin, int64_t end, A* workspace) {
  const int64_t entries = p.T * p.K;
  A *buffer = workspace, *v = buffer + p.D;
  for (int64_t e = begin; e < end;) {
    const int64_t index = p.index[p.order[e]];
    if (index < 0 || (e > 0 && p.index[p.order[e - 1]] == index)) {
      ++e;
      continue;
    }
    memset(v, 0, p.D * sizeof(A));
    for (; e < entries && p.index[p.order[e]] == index; ++e) {
      const int64_t entry = p.order[e], j = entry / p.K, k = entry % p.K;
      if (p.grad_similarity) add_scaled(v, p.grad_similarity[entry], p.texts + j * p.D, p.D);
      if (p.grad_unit && k < p.rows) add_scaled(v, A(1), p.grad_unit + (j * p.rows + k) * p.D, p.D);
    }
    const A* u = pixel(p, index, buffer);
    const A inverse = inverse_norm(u, p.D);
    // Where the norm is clamped, the unit vector is u / eps and has no radial part to remove.
    const A along = inverse < A(1e12) ? dot(v, u, p.D) * inverse * inverse : A(0);
    for (int64_t d = 0; d < p.D; ++d) v[d] = inverse * (v[d] - along * u[d]);
    store_row(p.type, p.grad_pixels, index * p.D, p.D, static_cast<const A*>(v));
  }
}

template <typename A>
constexpr DenseTable<A> kTable = {
    workspace_size<A>, packed_texts_size<A>, pack<A>, positives<A>, negatives<A>, merge<A>, gather<A>, texts<A>,
    pixels<A>};

}  // namespace

template <typename A>
const DenseTable<A>& dense_table() {
  return kTable<A>;
}
template const DenseTable<float>& dense_table<float>();
template const DenseTable<double>& dense_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
