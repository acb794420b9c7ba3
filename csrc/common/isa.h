// The best of the compiled instruction sets that this processor runs. OVSEG_X86 is set by CMake on x86-64.
#pragma once

namespace ovseg {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#ifdef OVSEG_X86
  static const Isa isa = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

}  // namespace ovseg
