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

// What `call` gives in the namespace of the best instruction set.
#ifdef OVSEG_X86
#define OVSEG_BEST_ISA(call)                                  \
  (::ovseg::best_isa() == ::ovseg::Isa::avx512 ? avx512::call \
   : ::ovseg::best_isa() == ::ovseg::Isa::avx2 ? avx2::call   \
                                               : baseline::call)
#else
#define OVSEG_BEST_ISA(call) baseline::call
#endif
