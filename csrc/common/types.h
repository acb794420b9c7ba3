// What parameter structs need: dtypes as plain numbers, and functions that hosts, devices and instruction sets share.
#pragma once
#include <cstdint>

#if defined(__CUDACC__) && !defined(OVSEG_EMULATED)
#define OVSEG_ANYWHERE_MEMBER __host__ __device__ inline
#define OVSEG_ANYWHERE static OVSEG_ANYWHERE_MEMBER
#else
#define OVSEG_ANYWHERE_MEMBER inline
#define OVSEG_ANYWHERE static inline  // of each file: one of them may be compiled for AVX-512
#endif

namespace ovseg {

enum class Type : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

}  // namespace ovseg

// A declaration in the namespace of every instruction set.
#define OVSEG_PER_ISA(...) \
  namespace baseline {     \
  __VA_ARGS__              \
  }                        \
  namespace avx2 {         \
  __VA_ARGS__              \
  }                        \
  namespace avx512 {       \
  __VA_ARGS__              \
  }
