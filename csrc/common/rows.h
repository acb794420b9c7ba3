// Rows of features on the CPU: conversion from and to any dtype, dot products, sums. Compiled once per instruction set.
#pragma once
#include "simd.h"
#include "types.h"

namespace ovseg {
namespace OVSEG_ISA {

template <typename A>
inline void load_row(Type type, const void* base, int64_t offset, int64_t D, A* out) {
  switch (type) {
    case Type::float32: {
      const float* x = static_cast<const float*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<A>(x[d]);
      break;
    }
    case Type::float64: {
      const double* x = static_cast<const double*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<A>(x[d]);
      break;
    }
    case Type::float16: {
      const _Float16* x = static_cast<const _Float16*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<A>(static_cast<float>(x[d]));
      break;
    }
    case Type::bfloat16: {
      const uint16_t* x = static_cast<const uint16_t*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) {
        const uint32_t bits = static_cast<uint32_t>(x[d]) << 16;
        float value;
        memcpy(&value, &bits, sizeof(value));
        out[d] = static_cast<A>(value);
      }
      break;
    }
  }
}

template <typename A>
inline void store_row(Type type, void* base, int64_t offset, int64_t D, const A* x) {
  switch (type) {
    case Type::float32: {
      float* out = static_cast<float*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<float>(x[d]);
      break;
    }
    case Type::float64: {
      double* out = static_cast<double*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<double>(x[d]);
      break;
    }
    case Type::float16: {
      _Float16* out = static_cast<_Float16*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<_Float16>(static_cast<float>(x[d]));
      break;
    }
    case Type::bfloat16: {
      uint16_t* out = static_cast<uint16_t*>(base) + offset;
      for (int64_t d = 0; d < D; ++d) {
        const float value = static_cast<float>(x[d]);
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        if (value == value) bits += 0x7fff + ((bits >> 16) & 1);  // round to nearest even; a NaN stays one
        out[d] = static_cast<uint16_t>(bits >> 16);
      }
      break;
    }
  }
}

template <typename A>
inline A dot(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// |x| of a row whose squares leave the range of A.
template <typename A>
__attribute__((noinline)) A long_norm(const A* x, int64_t n, A squared) {
  A top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A size = x[i] < A(0) ? -x[i] : x[i];
    top = size > top ? size : top;
  }
  if (squared != squared || top - top != A(0)) return squared;  // NaN or infinite itself
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / top) * (x[i] / top);
  return top * sqrt_of(sum);
}

template <typename A>
inline A norm_of(const A* x, int64_t n) {
  const A squared = dot(x, x, n);
  return squared - squared == A(0) ? sqrt_of(squared) : long_norm(x, n, squared);
}

template <typename A>
inline void add_scaled(A* out, A factor, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
}

// out[i][g] = x_i . rows_g for four rows x_i and G rows of D elements; out rows are G apart. Two rows_g at a time:
// eight sums in flight hide the latency of the additions.
template <typename A>
inline void dots4(const A* const (&x)[4], const A* rows, int64_t G, int64_t D, A* out) {
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  int64_t g = 0;
  for (; g + 2 <= G; g += 2) {
    const A *r = rows + g * D, *t = r + D;
    A r0 = 0, r1 = 0, r2 = 0, r3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : r0, r1, r2, r3, t0, t1, t2, t3)
    for (int64_t d = 0; d < D; ++d) {
      r0 += x0[d] * r[d], r1 += x1[d] * r[d], r2 += x2[d] * r[d], r3 += x3[d] * r[d];
      t0 += x0[d] * t[d], t1 += x1[d] * t[d], t2 += x2[d] * t[d], t3 += x3[d] * t[d];
    }
    out[g] = r0, out[G + g] = r1, out[2 * G + g] = r2, out[3 * G + g] = r3;
    out[g + 1] = t0, out[G + g + 1] = t1, out[2 * G + g + 1] = t2, out[3 * G + g + 1] = t3;
  }
  for (; g < G; ++g) {
    for (int i = 0; i < 4; ++i) out[i * G + g] = dot(x[i], rows + g * D, D);
  }
}

// rows_g += sum_i c[i][g] x_i for four rows x_i; c rows are G apart.
template <typename A>
inline void add_outer4(const A* const (&x)[4], const A* c, int64_t G, int64_t D, A* rows) {
  for (int64_t g = 0; g < G; ++g) {
    A* out = rows + g * D;
    const A c0 = c[g], c1 = c[G + g], c2 = c[2 * G + g], c3 = c[3 * G + g];
    for (int64_t d = 0; d < D; ++d) out[d] += c0 * x[0][d] + c1 * x[1][d] + c2 * x[2][d] + c3 * x[3][d];
  }
}

// out = sum_g c_g rows_g.
template <typename A>
inline void combine(const A* c, const A* rows, int64_t G, int64_t D, A* out) {
  constexpr int lanes = Vec<A>::lanes;
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    typename Vec<A>::type sum = load(rows + d) * c[0];
    for (int64_t g = 1; g < G; ++g) sum += load(rows + g * D + d) * c[g];
    store(out + d, sum);
  }
  for (; d < D; ++d) {
    A sum = 0;
    for (int64_t g = 0; g < G; ++g) sum += c[g] * rows[g * D + d];
    out[d] = sum;
  }
}

}  // namespace OVSEG_ISA
}  // namespace ovseg
