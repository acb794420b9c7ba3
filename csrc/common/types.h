// The dtypes of features, as plain numbers for parameter structs.
#pragma once
#include <cstdint>

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
