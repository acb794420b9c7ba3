// A small packed matrix product for the CPU kernels: C (+)= A B with B packed beforehand and A packed on the way.
//
// Why not a BLAS: the products here are short (tens to hundreds of rows), share one packed operand between calls, run
// inside a parallel region, and must give the same bits whatever the number of threads.
#pragma once
#include "simd.h"

namespace ovseg {
namespace OVSEG_ISA {

#if OVSEG_VECTOR_BYTES == 64
constexpr int kRows = 12;  // 24 accumulators, 2 of B and 1 of A in 32 registers
#elif OVSEG_VECTOR_BYTES == 32
constexpr int kRows = 6;  // 12 accumulators in 16 registers
#else
constexpr int kRows = 4;
#endif

template <typename T>
constexpr int kColumns = 2 * Vec<T>::lanes;

template <typename T>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  return (columns + kColumns<T> - 1) / kColumns<T> * kColumns<T> * depth;
}

// B(k, n) = b[k * row + n * column], k < depth, n < columns; panels of kColumns columns, zeros beyond the edge.
template <typename T>
void pack_b(const T* b, int64_t row, int64_t column, int64_t depth, int64_t columns, T* packed) {
  for (int64_t n0 = 0; n0 < columns; n0 += kColumns<T>) {
    const int width = columns - n0 < kColumns<T> ? static_cast<int>(columns - n0) : kColumns<T>;
    for (int64_t k = 0; k < depth; ++k, packed += kColumns<T>) {
      const T* source = b + k * row + n0 * column;
      for (int n = 0; n < width; ++n) packed[n] = source[n * column];
      for (int n = width; n < kColumns<T>; ++n) packed[n] = T(0);
    }
  }
}

template <typename T, int rows>
inline void tile(int64_t depth, const T* a, const T* b, T* c, int64_t ldc, int width, bool accumulate) {
  using V = typename Vec<T>::type;
  constexpr int L = Vec<T>::lanes;
  V acc[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) acc[i][0] = acc[i][1] = V{};
  for (int64_t k = 0; k < depth; ++k, a += kRows, b += 2 * L) {
    const V b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
  if (width == 2 * L) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      T* out = c + i * ldc;
      store(out, accumulate ? load(out) + acc[i][0] : acc[i][0]);
      store(out + L, accumulate ? load(out + L) + acc[i][1] : acc[i][1]);
    }
    return;
  }
  T edge[2 * L];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    store(edge, acc[i][0]);
    store(edge + L, acc[i][1]);
    T* out = c + i * ldc;
    for (int n = 0; n < width; ++n) out[n] = accumulate ? out[n] + edge[n] : edge[n];
  }
}

template <typename T, int rows>
inline void tile_rows(int count, int64_t depth, const T* a, const T* b, T* c, int64_t ldc, int width, bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) return tile_rows<T, rows - 1>(count, depth, a, b, c, ldc, width, accumulate);
  }
  tile<T, rows>(depth, a, b, c, ldc, width, accumulate);
}

// C(m, n) (+)= sum_k A(m, k) B(k, n) with A(m, k) = a[m * row + k * column]. `panel` is scratch of kRows * depth.
// `upper_only` leaves out what lies wholly below the diagonal of a symmetric C; see mirror().
template <typename T>
void gemm(int64_t m, int64_t n, int64_t depth, const T* a, int64_t row, int64_t column, const T* packed_b, T* c,
          int64_t ldc, bool accumulate, T* panel, bool upper_only = false) {
  for (int64_t m0 = 0; m0 < m; m0 += kRows) {
    const int count = m - m0 < kRows ? static_cast<int>(m - m0) : kRows;
    const T* source = a + m0 * row;
    for (int64_t k = 0; k < depth; ++k) {
      for (int i = 0; i < count; ++i) panel[k * kRows + i] = source[i * row + k * column];
    }
    const int64_t first = upper_only ? m0 / kColumns<T> * kColumns<T> : 0;
    for (int64_t n0 = first; n0 < n; n0 += kColumns<T>) {
      const int width = n - n0 < kColumns<T> ? static_cast<int>(n - n0) : kColumns<T>;
      tile_rows<T, kRows>(count, depth, panel, packed_b + n0 * depth, c + m0 * ldc + n0, ldc, width, accumulate);
    }
  }
}

template <typename T>
void mirror(T* c, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) c[i * n + j] = c[j * n + i];
  }
}

}  // namespace OVSEG_ISA
}  // namespace ovseg
