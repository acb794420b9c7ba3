// patch_text_similarity on the CPU, forward and backward by recomputation. Compiled once per instruction set.
//
// One task owns one image (forward) or one slot of consecutive images (backward) and walks over the texts in tiles, so
// that the similarities S [tile, N] of one image stay in the cache. Slots are fixed by the shapes, each sums its images
// in order, and the slots are summed in order: the bits do not depend on the number of threads.
//
// The pooled vector v = sum_n a_n u_n is needed only through |v|, v.q and <u_n, v>. Two forms, chosen by their cost:
//   Gram  |v|^2 = a^T G a with G = U U^T [N, N], never a vector of width D per text   (N small against D and T)
//   PV    v itself, one tile at a time                                                (otherwise)
#include "../common/gemm.h"
#include "../common/rows.h"
#include "patch_text_similarity.h"

namespace ovseg {
namespace OVSEG_ISA {
namespace {

constexpr int64_t kTile = 64;   // texts per tile
constexpr double kEps = 1e-12;  // of norms, as in torch.nn.functional.normalize
// From a patch of this length on, squares leave the range of A: such an image goes the way that needs none.
template <typename A>
constexpr A kLong = sizeof(A) == 8 ? A(1e150) : A(1e15);
// Below this share of (sum a |u|)^2 the Gram form's |v|^2 has lost more digits to cancellation than v itself would.
constexpr double kCancelled = 1e-3;

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename A>
bool use_gram(const PatchTextParams<A>& p) {
  if (p.pool != Pool::vector) return false;
  const double T = p.T, N = p.N, D = p.D;
  const double gram = 2 * N * N * D + 3 * N * N * T;  // G, H U; G a twice, H (symmetric products count half)
  const double pv = 4 * T * N * D;                    // v twice, e, the value path
  return N <= 1024 && gram < pv;
}

// Scratch of one thread, laid out once.
template <typename A>
struct Workspace {
  A *u, *packed_ut, *packed_u, *r, *r_inv, *keep, *colsum;
  A *gram, *packed_gram, *h, *packed_tile;
  A *s, *a, *ga, *m, *v, *du, *panel;
  int64_t size = 0;
  bool in_gram = false;  // the form of this image

  A* take(A* base, int64_t count) {
    A* at = base ? base + size : nullptr;
    size += (count + 31) / 32 * 32;
    return at;
  }
  Workspace(const PatchTextParams<A>& p, A* base) {
    const bool gram_form = use_gram(p);
    const int64_t N = p.N, D = p.D, tile = min64(kTile, p.T);
    u = take(base, N * D);
    packed_ut = take(base, packed_size<A>(D, N));
    packed_u = take(base, packed_size<A>(N, D));
    r = take(base, N);
    r_inv = take(base, N);
    keep = take(base, N);
    colsum = take(base, N);
    gram = take(base, gram_form ? N * N : 0);
    packed_gram = take(base, gram_form ? packed_size<A>(N, N) : 0);
    h = take(base, gram_form ? N * N : 0);
    packed_tile = take(base, max64(packed_size<A>(tile, N), packed_size<A>(tile, D)));
    s = take(base, tile * N);
    a = take(base, tile * N);
    ga = take(base, tile * N);
    m = take(base, tile * N);
    v = take(base, p.pool == Pool::vector ? tile * D : 0);
    du = take(base, N * D);
    panel = take(base, kRows * max64(max64(N, D), tile));
  }
};

// u, norms and keep of image b. A masked patch becomes a zero row, so that whatever it holds reaches nothing.
// Returns the number of kept patches.
template <typename A>
int64_t load_image(const PatchTextParams<A>& p, int64_t b, Workspace<A>& w) {
  int64_t kept = 0;
  w.in_gram = use_gram(p);
  for (int64_t n = 0; n < p.N; ++n) {
    A* row = w.u + n * p.D;
    const bool keep = p.mask == nullptr || p.mask[b * p.mask_strides[0] + n * p.mask_strides[1]];
    if (keep) {
      load_row(p.type, p.patches, b * p.patch_strides[0] + n * p.patch_strides[1], p.D, row);
      ++kept;
    } else {
      memset(row, 0, p.D * sizeof(A));
    }
    const A norm = norm_of(row, p.D);
    w.r[n] = norm;
    if (norm > kLong<A>) w.in_gram = false;
    // A NaN must go on being one: the comparison is written so that it is not clamped away.
    w.r_inv[n] = A(1) / (norm < A(kEps) ? A(kEps) : norm);
    w.keep[n] = keep ? A(1) : A(0);
  }
  pack_b(w.u, 1, p.D, p.D, p.N, w.packed_ut);
  if (w.in_gram && kept) {
    gemm(p.N, p.N, p.D, w.u, p.D, int64_t(1), w.packed_ut, w.gram, p.N, false, w.panel, true);
    mirror(w.gram, p.N);
    pack_b(w.gram, p.N, 1, p.N, p.N, w.packed_gram);
  }
  return kept;
}

// Cosines s [rows, N] of texts t0 .. t0 + rows with the patches: equation (1).
template <typename A>
void cosines(const PatchTextParams<A>& p, int64_t t0, int64_t rows, Workspace<A>& w) {
  gemm(rows, p.N, p.D, p.unit_texts + t0 * p.D, p.D, int64_t(1), w.packed_ut, w.s, p.N, false, w.panel);
  for (int64_t j = 0; j < rows; ++j) {
    A* s = w.s + j * p.N;
    for (int64_t n = 0; n < p.N; ++n) s[n] *= w.r_inv[n];
  }
}

// Weights a_n = f(s_n) / sum f of one text, equation (2); returns the log of the sum. Forward and backward find the
// same bits: what a large scale multiplies in the backward are differences of them.
template <typename A>
A weights(const PatchTextParams<A>& p, const A* s, const A* keep, A* a) {
  const A scale = p.scale, bias = p.weight == Weight::sigmoid ? p.bias : A(0);
  A top = -A(3e38);
#pragma omp simd reduction(max : top)
  for (int64_t n = 0; n < p.N; ++n) {
    const A x = scale * s[n] + bias;
    a[n] = x;
    // Compared and taken: the lanes of a reduction begin at the lowest number there is, below 3e38.
    const A seen = keep[n] != A(0) ? x : -A(3e38);
    top = seen > top ? seen : top;
  }
  // sigmoid(x) = e^x / (1 + e^x); relative to e^min(top, 0) neither form over- or underflows where it matters.
  const A shift = p.weight == Weight::sigmoid && top > A(0) ? A(0) : top;
  A sum = 0;
  if (p.weight == Weight::softmax) {
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < p.N; ++n) {
      const A e = exp_fast(a[n] - shift);  // of a masked patch it may be infinite
      a[n] = keep[n] != A(0) ? e : A(0);
      sum += a[n];
    }
  } else {
    for (int64_t n = 0; n < p.N; ++n) {
      const A x = a[n];  // of a masked patch f may be infinite
      const A f = x > A(0) ? exp_fast(-shift) / (A(1) + exp_fast(-x)) : exp_fast(x - shift) / (A(1) + exp_fast(x));
      a[n] = keep[n] != A(0) ? f : A(0);
      sum += a[n];
    }
  }
  const A factor = A(1) / sum;
  for (int64_t n = 0; n < p.N; ++n) a[n] *= factor;
  return shift + log_of(sum);
}

// d log f / d s at s_n: scale for softmax, scale (1 - sigmoid) for sigmoid.
template <typename A>
void slopes(const PatchTextParams<A>& p, const A* s, A* out) {
  if (p.weight == Weight::softmax) {
    for (int64_t n = 0; n < p.N; ++n) out[n] = A(1);
    return;
  }
  for (int64_t n = 0; n < p.N; ++n) {
    const A x = p.scale * s[n] + p.bias;
    out[n] = x > A(0) ? exp_fast(-x) / (A(1) + exp_fast(-x)) : A(1) / (A(1) + exp_fast(x));
  }
}

template <typename A>
int64_t first_maximum(const A* s, const A* keep, int64_t N) {
  int64_t best = -1;
  for (int64_t n = 0; n < N; ++n) {
    if (keep[n] == A(0)) continue;
    if (best < 0 || s[n] > s[best] || (s[n] != s[n] && s[best] == s[best])) best = n;
  }
  return best;
}

// |v| of one text from a^T G a, or from v itself where cancellation has eaten the digits of the former.
template <typename A>
A gram_norm(const PatchTextParams<A>& p, const A* a, const A* ga, Workspace<A>& w) {
  const A squared = dot(a, ga, p.N);
  const A bound = dot(a, w.r, p.N);
  if (!(squared < A(kCancelled) * bound * bound)) return sqrt_of(squared);
  memset(w.v, 0, p.D * sizeof(A));
  for (int64_t n = 0; n < p.N; ++n) add_scaled(w.v, a[n], w.u + n * p.D, p.D);
  return sqrt_of(dot(w.v, w.v, p.D));
}

template <typename A>
void forward_images(const PatchTextParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> w(p, memory);
  const bool vector = p.pool == Pool::vector;
  for (int64_t b = begin; b < end; ++b) {
    A* phi = p.similarity + b * p.T;
    A* lse = p.lse + b * p.T;
    if (load_image(p, b, w) == 0) {  // a fully masked image is similar to nothing
      for (int64_t t = 0; t < p.T; ++t) {
        phi[t] = A(0);
        if (p.pool != Pool::max) lse[t] = -static_cast<A>(__builtin_inf());
        if (vector) p.norm[b * p.T + t] = A(0);
      }
      continue;
    }
    const bool gram = w.in_gram;
    if (vector && !gram) pack_b(w.u, p.D, 1, p.N, p.D, w.packed_u);
    for (int64_t t0 = 0; t0 < p.T; t0 += kTile) {
      const int64_t rows = min64(kTile, p.T - t0);
      cosines(p, t0, rows, w);
      for (int64_t j = 0; j < rows; ++j) {
        const A* s = w.s + j * p.N;
        if (p.pool == Pool::max) {
          phi[t0 + j] = s[first_maximum(s, w.keep, p.N)];
          continue;
        }
        lse[t0 + j] = weights(p, s, w.keep, w.a + j * p.N);
        if (p.pool == Pool::score) phi[t0 + j] = dot(w.a + j * p.N, s, p.N);  // (3)
      }
      if (!vector) continue;
      if (gram) {
        gemm(rows, p.N, p.N, w.a, p.N, int64_t(1), w.packed_gram, w.ga, p.N, false, w.panel);
      } else {
        gemm(rows, p.D, p.N, w.a, p.N, int64_t(1), w.packed_u, w.v, p.D, false, w.panel);
      }
      for (int64_t j = 0; j < rows; ++j) {
        const A* a = w.a + j * p.N;
        A norm, along;  // |v| and v . q
        if (gram) {
          norm = gram_norm(p, a, w.ga + j * p.N, w);
          along = 0;
          const A* s = w.s + j * p.N;
#pragma omp simd reduction(+ : along)
          for (int64_t n = 0; n < p.N; ++n) along += a[n] * w.r[n] * s[n];
        } else {
          const A* v = w.v + j * p.D;
          norm = norm_of(v, p.D);
          along = dot(v, p.unit_texts + (t0 + j) * p.D, p.D);
        }
        p.norm[b * p.T + t0 + j] = norm;
        phi[t0 + j] = along / (norm < A(kEps) ? A(kEps) : norm);  // (4)
      }
    }
  }
}

// One tile of texts: from s to the coefficients m [rows, N] with d phi -> dU = m^T q and dq = m U, equations (5)-(9).
// What is not of that form (the Gram or value path, the sphere projection) goes to h or du, and to colsum.
template <typename A>
void backward_tile(const PatchTextParams<A>& p, int64_t b, int64_t t0, int64_t rows, A* dq, double* scalars,
                   Workspace<A>& w) {
  const bool gram = w.in_gram;
  const int64_t N = p.N, D = p.D;
  const A* grad = p.grad + b * p.T + t0;
  const A* phi = p.similarity + b * p.T + t0;
  const A* norm = p.norm ? p.norm + b * p.T + t0 : nullptr;
  for (int64_t j = 0; j < rows; ++j) weights(p, w.s + j * N, w.keep, w.a + j * N);
  if (p.pool == Pool::vector) {
    if (gram) {
      gemm(rows, N, N, w.a, N, int64_t(1), w.packed_gram, w.ga, N, false, w.panel);
    } else {  // y = (q - phi v / |v|) / |v| in place of v, then <u_n, y> for all n
      gemm(rows, D, N, w.a, N, int64_t(1), w.packed_u, w.v, D, false, w.panel);
      for (int64_t j = 0; j < rows; ++j) {
        A* v = w.v + j * D;
        const A* q = p.unit_texts + (t0 + j) * D;
        const bool clamped = norm[j] < A(kEps);
        const A inverse = A(1) / (clamped ? A(kEps) : norm[j]);
        const A back = clamped ? A(0) : phi[j] * inverse;
        if (dq) add_scaled(dq + (t0 + j) * D, grad[j] * inverse, v, D);
        for (int64_t d = 0; d < D; ++d) v[d] = (q[d] - back * v[d]) * inverse;
      }
      gemm(rows, N, D, w.v, D, int64_t(1), w.packed_ut, w.ga, N, false, w.panel);
    }
  }
  A* slope = w.panel;  // free between products; kRows * N elements at least
  for (int64_t j = 0; j < rows; ++j) {
    const A *s = w.s + j * N, *a = w.a + j * N, *ga = w.ga + j * N;
    A* m = w.m + j * N;
    slopes(p, s, slope);
    const A g = grad[j];
    A inverse = 0, back = 0, direct = 0, value = 0;
    if (p.pool == Pool::vector) {
      const bool clamped = norm[j] < A(kEps);
      inverse = A(1) / (clamped ? A(kEps) : norm[j]);
      if (gram) {
        back = clamped ? A(0) : phi[j] * inverse * inverse;
        direct = g * inverse;
      } else {
        value = g;
      }
    }
    A d_scale = 0, d_bias = 0;
    A* colsum = w.colsum;
    if (p.pool == Pool::vector) {
      const A by_s = gram ? inverse : A(0), by_ga = gram ? -back : A(1);
      A* e = m;
      A rest = 0;  // sum a e, 0 but for rounding, which the scale would multiply
#pragma omp simd reduction(+ : rest)
      for (int64_t n = 0; n < N; ++n) {
        e[n] = w.r[n] * s[n] * by_s + ga[n] * by_ga;  // (6)
        rest += a[n] * e[n];
      }
#pragma omp simd reduction(+ : d_scale, d_bias)
      for (int64_t n = 0; n < N; ++n) {
        const A c = g * a[n] * slope[n] * (e[n] - rest);
        d_scale += c * s[n];
        d_bias += c;
        colsum[n] += p.scale * c * s[n];
        m[n] = p.scale * c * w.r_inv[n] + direct * a[n];  // (7)
      }
    } else {
      const A mean = dot(a, s, N);  // phi, of these very weights
#pragma omp simd reduction(+ : d_scale, d_bias)
      for (int64_t n = 0; n < N; ++n) {
        const A c = g * a[n] * slope[n] * (s[n] - mean);
        const A total = g * a[n] + p.scale * c;  // (5)
        d_scale += c * s[n];
        d_bias += c;
        colsum[n] += total * s[n];
        m[n] = total * w.r_inv[n];
      }
    }
    scalars[0] += d_scale;
    if (p.weight == Weight::sigmoid) scalars[1] += d_bias;
    if (p.pool != Pool::vector || !p.grad_patches) continue;
    // The value path: ga becomes the left factor of H (Gram, (8)) or a becomes g a (PV, (9)).
    const A factor = gram ? g * back : value;
    for (int64_t n = 0; n < N; ++n) w.ga[j * N + n] = factor * a[n];
  }
  if (p.pool == Pool::vector && p.grad_patches) {
    if (gram) {
      pack_b(w.a, N, 1, rows, N, w.packed_tile);
      gemm(N, N, rows, w.ga, int64_t(1), N, w.packed_tile, w.h, N, true, w.panel, true);
    } else {
      pack_b(w.v, D, 1, rows, D, w.packed_tile);
      gemm(N, D, rows, w.ga, int64_t(1), N, w.packed_tile, w.du, D, true, w.panel);
    }
  }
}

template <typename A>
void backward_max_tile(const PatchTextParams<A>& p, int64_t b, int64_t t0, int64_t rows, A* dq, Workspace<A>& w) {
  for (int64_t j = 0; j < rows; ++j) {
    const A* s = w.s + j * p.N;
    const int64_t n = first_maximum(s, w.keep, p.N);
    const A g = p.grad[b * p.T + t0 + j];
    add_scaled(w.du + n * p.D, g * w.r_inv[n], p.unit_texts + (t0 + j) * p.D, p.D);
    w.colsum[n] += g * s[n];
    if (dq) add_scaled(dq + (t0 + j) * p.D, g * w.r_inv[n], w.u + n * p.D, p.D);
  }
}

template <typename A>
int64_t packed_texts_size(int64_t T, int64_t D) {
  int64_t size = 0;
  for (int64_t t0 = 0; t0 < T; t0 += kTile) size += packed_size<A>(min64(kTile, T - t0), D);
  return size;
}

template <typename A>
void backward_slots(const PatchTextParams<A>& p, int64_t begin, int64_t end, A* memory) {
  Workspace<A> w(p, memory);
  for (int64_t slot = begin; slot < end; ++slot) {
    A* dq = p.slot_texts ? p.slot_texts + slot * p.T * p.D : nullptr;
    double* scalars = p.slot_scalars + 2 * slot;
    if (dq) memset(dq, 0, p.T * p.D * sizeof(A));
    scalars[0] = scalars[1] = 0;
    for (int64_t b = p.B * slot / p.slots; b < p.B * (slot + 1) / p.slots; ++b) {
      const bool any = load_image(p, b, w) > 0, gram = w.in_gram;
      memset(w.du, 0, p.N * p.D * sizeof(A));
      if (any) {
        memset(w.colsum, 0, p.N * sizeof(A));
        if (gram) memset(w.h, 0, p.N * p.N * sizeof(A));
        pack_b(w.u, p.D, 1, p.N, p.D, w.packed_u);
        const A* packed_texts = p.packed_texts;
        for (int64_t t0 = 0; t0 < p.T; t0 += kTile) {
          const int64_t rows = min64(kTile, p.T - t0);
          cosines(p, t0, rows, w);
          if (p.pool == Pool::max) {
            backward_max_tile(p, b, t0, rows, dq, w);
            continue;
          }
          backward_tile(p, b, t0, rows, dq, scalars, w);
          if (dq) {
            gemm(rows, p.D, p.N, w.m, p.N, int64_t(1), w.packed_u, dq + t0 * p.D, p.D, true, w.panel);
          }
          if (p.grad_patches) {
            gemm(p.N, p.D, rows, w.m, int64_t(1), p.N, packed_texts, w.du, p.D, true, w.panel);
          }
          packed_texts += packed_size<A>(rows, p.D);
        }
        if (gram && p.grad_patches) {
          mirror(w.h, p.N);
          for (int64_t i = 0; i < p.N * p.N; ++i) w.h[i] = -w.h[i];
          gemm(p.N, p.D, p.N, w.h, p.N, int64_t(1), w.packed_u, w.du, p.D, true, w.panel);
        }
      }
      if (!p.grad_patches) continue;
      for (int64_t n = 0; n < p.N; ++n) {
        A* row = w.du + n * p.D;
        // The projection onto the sphere; a norm clamped at eps is a constant and has none.
        if (any && !(w.r[n] < A(kEps))) add_scaled(row, -w.colsum[n] * w.r_inv[n] * w.r_inv[n], w.u + n * p.D, p.D);
        if (w.keep[n] == A(0)) memset(row, 0, p.D * sizeof(A));  // be the gradient of the others NaN
        store_row(p.type, p.grad_patches, (b * p.N + n) * p.D, p.D, row);
      }
    }
  }
}

template <typename A>
void prepare_texts(const PatchTextParams<A>& p) {
  for (int64_t t = 0; t < p.T; ++t) {
    A* row = p.unit_texts + t * p.D;
    load_row(p.type, p.texts, t * p.text_strides[0], p.D, row);
    const A norm = norm_of(row, p.D);
    p.text_norms[t] = norm;
    const A inverse = A(1) / (norm < A(kEps) ? A(kEps) : norm);
    for (int64_t d = 0; d < p.D; ++d) row[d] *= inverse;
  }
  if (!p.packed_texts) return;
  A* packed = p.packed_texts;
  for (int64_t t0 = 0; t0 < p.T; t0 += kTile) {
    const int64_t rows = min64(kTile, p.T - t0);
    pack_b(p.unit_texts + t0 * p.D, p.D, 1, rows, p.D, packed);
    packed += packed_size<A>(rows, p.D);
  }
}

// Sum of the slots in order, then the projection of the text gradient onto the sphere.
template <typename A>
void finish_texts(const PatchTextParams<A>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    A* sum = p.slot_texts + t * p.D;
    for (int64_t slot = 1; slot < p.slots; ++slot) add_scaled(sum, A(1), sum + slot * p.T * p.D, p.D);
    const A* q = p.unit_texts + t * p.D;
    const bool clamped = p.text_norms[t] < A(kEps);
    const A inverse = A(1) / (clamped ? A(kEps) : p.text_norms[t]);
    if (!clamped) add_scaled(sum, -dot(sum, q, p.D), q, p.D);
    for (int64_t d = 0; d < p.D; ++d) sum[d] *= inverse;
    store_row(p.type, p.grad_texts, t * p.D, p.D, sum);
  }
}

template <typename A>
int64_t workspace_size(const PatchTextParams<A>& p) {
  return Workspace<A>(p, nullptr).size;
}

#define OVSEG_STRING_(x) #x
#define OVSEG_STRING(x) OVSEG_STRING_(x)
template <typename A>
constexpr PatchTextTable<A> kTable = {OVSEG_STRING(OVSEG_ISA), packed_texts_size<A>, workspace_size<A>,
                                      prepare_texts<A>,        forward_images<A>,    backward_slots<A>,
                                      finish_texts<A>};

}  // namespace

template <typename A>
const PatchTextTable<A>& patch_text_table() {
  return kTable<A>;
}
template const PatchTextTable<float>& patch_text_table<float>();
template const PatchTextTable<double>& patch_text_table<double>();

}  // namespace OVSEG_ISA
}  // namespace ovseg
