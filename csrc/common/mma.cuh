// Tensor-core products and asynchronous copies of sm_80: the only inline PTX, each with a portable body.
//
// Fragments of mma.sync, for lane l with g = l / 4 and t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16/k8"):
//   16-bit  m16n8k16  a[0] = A[g][2t..2t+1], a[1] = A[g+8][same], a[2], a[3] = the same at k + 8
//                     b[0] = B[2t..2t+1][g], b[1] = the same at k + 8
//   tf32    m16n8k8   a[0] = A[g][t], a[1] = A[g+8][t], a[2], a[3] = the same at k + 4; b[0] = B[t][g], b[1] at k + 4
//   sums              c[0], c[1] = C[g][2t], C[g][2t+1]; c[2], c[3] = the same in row g + 8
#pragma once
#include <cstring>

#include "device.cuh"

namespace ovseg {

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[2];
};

// To the 10-bit mantissa that tf32 products read; nearest, ties away from zero, as cvt.rna does.
__device__ inline float round_tf32(float x) {
#ifdef OVSEG_EMULATED
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#endif
}

#ifdef OVSEG_EMULATED
namespace emulated {

template <typename T>  // element (row or column i, k) of a fragment pair, from the lane that holds it
float element(const uint32_t* words, int word, int k) {
  if constexpr (sizeof(T) == 2) {
    T value;
    std::memcpy(&value, reinterpret_cast<const unsigned char*>(words + word) + 2 * (k % 2), 2);
    return to_float(value);
  } else {
    float value;
    std::memcpy(&value, words + word, 4);
    return value;
  }
}

template <typename T>
OVSEG_UNCOUNTED void mma(float (&c)[4], const FragmentA& a, const FragmentB& b) {
  constexpr int K = sizeof(T) == 2 ? 16 : 8, half_k = K / 2, per_word = sizeof(T) == 2 ? 2 : 1;
  struct Pair {
    FragmentA a;
    FragmentB b;
  } mine{a, b};
  const int lane = emulation::lane();
  std::memcpy(emulation::warp_slot(lane), &mine, sizeof(mine));
  emulation::warp_barrier(kFullWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int k = 0; k < K; ++k) {
      const int t = k % half_k / per_word;
      Pair from_a, from_b;
      std::memcpy(&from_a, emulation::warp_slot(row % 8 * 4 + t), sizeof(Pair));
      std::memcpy(&from_b, emulation::warp_slot(column * 4 + t), sizeof(Pair));
      sum += element<T>(from_a.a.x, row / 8 + 2 * (k / half_k), k) * element<T>(from_b.b.x, k / half_k, k);
    }
    c[i] += sum;
  }
  emulation::warp_barrier(kFullWarp);
}

template <bool turned>
OVSEG_UNCOUNTED void load_matrices(uint32_t (&x)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix of a row that is not at a multiple of 16 bytes");
  const int lane = emulation::lane();
  std::memcpy(emulation::warp_slot(lane), &row, sizeof(row));
  emulation::warp_barrier(kFullWarp);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int at[2] = {lane / 4, lane % 4 * 2 + i};  // row and column
      const unsigned char* source;
      std::memcpy(&source, emulation::warp_slot(8 * matrix + at[turned]), sizeof(source));
      std::memcpy(pair + i, source + 2 * at[!turned], 2);
    }
    std::memcpy(x + matrix, pair, 4);
  }
  emulation::warp_barrier(kFullWarp);
}

}  // namespace emulated
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names the 16 bytes of row i % 8 of matrix i / 8.
// Word m of lane l becomes elements 2 (l % 4) and the one after of row l / 4 of matrix m, or of its transpose.
template <bool turned>
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
#ifdef OVSEG_EMULATED
  emulated::load_matrices<turned>(x, row);
#else
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (turned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
  }
#endif
}

// One of the two 16-bit elements of a word, and its bits as a tf32 number, which holds it exactly.
template <typename T>
__device__ inline float half_of(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
  T value;
  memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}
__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// c += a b for one warp: T is half, bfloat16 (m16n8k16) or float (tf32, m16n8k8).
template <typename T>
__device__ inline void mma(float (&c)[4], const FragmentA& a, const FragmentB& b) {
#ifdef OVSEG_EMULATED
  emulated::mma<T>(c, a, b);
#else
  if constexpr (std::is_same_v<T, half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  }
#endif
}

// 16 bytes from global to shared memory, in flight until wait_copies; the bytes past `valid` become zero.
__device__ inline void copy_async(void* shared, const void* global, int valid) {
#ifdef OVSEG_EMULATED
  emulation::copy_async(shared, global, 16, valid);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid));
#endif
}
__device__ inline void commit_copies() {
#ifdef OVSEG_EMULATED
  emulation::commit_async();
#else
  asm volatile("cp.async.commit_group;");
#endif
}
// Until at most `pending` committed groups are still in flight. A barrier must follow before other threads' copies are
// read.
template <int pending>
__device__ inline void wait_copies() {
#ifdef OVSEG_EMULATED
  emulation::wait_async(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace ovseg
