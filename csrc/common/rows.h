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

template <typename A>
inline void add_scaled(A* out, A factor, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
}

// out_g = x . rows_g for G rows of D elements: x is read once for four of them.
template <typename A>
inline void dots(const A* x, const A* rows, int64_t G, int64_t D, A* out) {
  int64_t g = 0;
  for (; g + 4 <= G; g += 4) {
    const A *r0 = rows + g * D, *r1 = r0 + D, *r2 = r1 + D, *r3 = r2 + D;
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t d = 0; d < D; ++d) {
      s0 += x[d] * r0[d], s1 += x[d] * r1[d], s2 += x[d] * r2[d], s3 += x[d] * r3[d];
    }
    out[g] = s0, out[g + 1] = s1, out[g + 2] = s2, out[g + 3] = s3;
  }
  for (; g < G; ++g) out[g] = dot(x, rows + g * D, D);
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
