// Portable SIMD by GCC/Clang vector extensions. A file that includes this is compiled once per instruction set, with
//   OVSEG_ISA           the namespace of that build (baseline, avx2, avx512)
//   OVSEG_VECTOR_BYTES  the width of a vector register
// Only builtins and plain loops may be used below: an inline function of the standard library compiled here for AVX-512
// could be the copy that the linker keeps for everybody.
#pragma once
#include <cstdint>
#include <cstring>

namespace ovseg {
namespace OVSEG_ISA {

template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(OVSEG_VECTOR_BYTES)));
  static constexpr int lanes = OVSEG_VECTOR_BYTES / sizeof(T);
};

template <typename T>
inline typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
  memcpy(p, &v, sizeof(v));
}

// exp for x <= 88, about 1 ulp; below -87 it returns exp(-87) = 1.6e-38, which callers multiply by zero or lose in a
// sum that holds a 1. Written without branches so that loops over it become vector code.
inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // round to nearest by the magic number 1.5 * 2^23
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}
inline double exp_fast(double x) { return __builtin_exp(x); }

// log(1 + e) for 0 <= e <= 1: the series of 2 atanh(e / (2 + e)), whose argument is at most 1/3.
inline float log1p_fast(float e) {
  const float z = e / (2.0f + e), s = z * z;
  float p = 1.0f / 13.0f;
  p = p * s + 1.0f / 11.0f;
  p = p * s + 1.0f / 9.0f;
  p = p * s + 1.0f / 7.0f;
  p = p * s + 1.0f / 5.0f;
  p = p * s + 1.0f / 3.0f;
  return 2.0f * z * (p * s + 1.0f);
}
inline double log1p_fast(double e) { return __builtin_log1p(e); }

inline float sqrt_of(float x) { return __builtin_sqrtf(x); }
inline double sqrt_of(double x) { return __builtin_sqrt(x); }
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

}  // namespace OVSEG_ISA
}  // namespace ovseg
