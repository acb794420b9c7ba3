// One block's matrix product: C[64, 64] += A[64, K] B[64, K]^T by 128 threads, operands from global memory of any
// stride.
//
// A Product says how: Exact (fused multiply-add in float or double), Tf32 or Mma16 (tensor cores, float sums),
// Tf32Twice (tensor cores, the digits of a float). Operands whose k is contiguous, aligned and of the product's own
// type travel by cp.async; all others are converted on the way.
#pragma once
#include "mma.cuh"

namespace ovseg {

constexpr int kThreads = 128;
constexpr int kTile = 64;          // rows and columns of a block's tile
constexpr int kAccumulators = 32;  // of each thread

template <typename A>
struct Exact {
  using Element = A;
  using Sum = A;
  static constexpr bool tensor = false;
  static constexpr int parts = 1;
};
struct Tf32 {
  using Element = float;
  using Sum = float;
  static constexpr bool tensor = true;
  static constexpr int parts = 1;
};
struct Tf32Twice : Tf32 {  // each factor as the sum of two tf32 numbers; the product of the two small ones is left out
  static constexpr int parts = 2;
};
template <typename T>
struct Mma16 {
  using Element = T;
  using Sum = float;
  static constexpr bool tensor = true;
  static constexpr int parts = 1;
};

// A step of k is 64 bytes; rows are 16 bytes apart from a multiple of it, so that fragments load without bank
// conflicts.
template <typename P>
constexpr int kStep = 64 / sizeof(typename P::Element);
template <typename P>
constexpr int kPitch = 80 / sizeof(typename P::Element);
constexpr int kOperandBytes = kTile * 80;
constexpr int kStageBytes = 4 * kOperandBytes;  // two operands, two stages

// Element (row, k) is base[row * row_stride + k * k_stride], zero outside rows x depth and where keep is false.
template <typename T, typename A>
struct Operand {
  using Element = T;
  const T* base;
  int64_t row_stride, k_stride;
  int64_t rows, depth;
  const bool* keep = nullptr;  // masked patches read as zero, whatever they hold
  int64_t keep_stride = 0;
  bool keep_by_k = false;       // keep is indexed by k, not by row
  const A* k_factor = nullptr;  // multiplies column k

  __device__ bool kept(int64_t row, int64_t k) const {
    return row < rows && k < depth && (!keep || keep[(keep_by_k ? k : row) * keep_stride]);
  }
  __device__ int64_t place(int64_t row) const { return row; }
};

// Row i is row list[i] of the base.
template <typename T, typename A>
struct Listed : Operand<T, A> {
  const int32_t* list;
  __device__ int64_t place(int64_t row) const { return list[row]; }
};

template <typename P, typename X>
__device__ void fill(typename P::Element* shared, const X& x, int64_t row0, int64_t k0) {
  using Element = typename P::Element;
  using T = typename X::Element;
  if constexpr (std::is_same_v<T, Element>) {
    constexpr int kPart = 16 / sizeof(T);
    if (x.k_stride == 1 && !x.k_factor && !x.keep_by_k && x.row_stride % kPart == 0 &&
        reinterpret_cast<uintptr_t>(x.base) % 16 == 0) {
      for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
        const int row = i / 4, part = i % 4 * kPart;
        const int64_t left = x.depth - (k0 + part);
        const bool any = left > 0 && x.kept(row0 + row, k0 + part);
        const int valid = any ? static_cast<int>(left < kPart ? left * sizeof(T) : 16) : 0;
        copy_async(shared + row * kPitch<P> + part,
                   any ? x.base + x.place(row0 + row) * x.row_stride + k0 + part : x.base, valid);
      }
      return;
    }
  }
  const bool along_k = x.k_stride == 1;  // neighbouring threads read neighbouring addresses
  for (int i = threadIdx.x; i < kTile * kStep<P>; i += kThreads) {
    const int row = along_k ? i / kStep<P> : i % kTile, k = along_k ? i % kStep<P> : i / kTile;
    typename P::Sum value = 0;
    if (x.kept(row0 + row, k0 + k)) {
      value = to_float(x.base[x.place(row0 + row) * x.row_stride + (k0 + k) * x.k_stride]);
      if (x.k_factor) value *= x.k_factor[k0 + k];
    }
    shared[row * kPitch<P> + k] = from_float<Element>(value);
  }
}

// Which element of the tile accumulator i of this thread is.
template <typename P>
__device__ inline int tile_row(int i) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if constexpr (P::tensor) return warp / 2 * 32 + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
  return thread / 16 + i / 4 * 8;
}
template <typename P>
__device__ inline int tile_column(int i) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if constexpr (P::tensor) return warp % 2 * 32 + i % 16 / 4 * 8 + lane % 4 * 2 + i % 2;
  return thread % 16 + i % 4 * 16;
}

// A 32-bit word of a fragment of E: two 16-bit elements or one tf32 number; of floats, as a sum of `parts` such words.
template <typename E, int parts, typename T>
__device__ inline void words(const T* at, uint32_t (&out)[parts]) {
  if constexpr (std::is_same_v<T, E> && sizeof(T) == 2) {
    static_assert(parts == 1, "as it is");
    out[0] = *reinterpret_cast<const uint32_t*>(at);
  } else {
    constexpr int kPer = 4 / sizeof(E);
    float rest[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) rest[i] = at[i];
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      alignas(4) E rounded[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if constexpr (sizeof(E) == 2) {
          rounded[i] = from_float<E>(rest[i]);
        } else {
          rounded[i] = round_tf32(rest[i]);
        }
        rest[i] -= to_float(rounded[i]);
      }
      out[part] = *reinterpret_cast<const uint32_t*>(rounded);
    }
  }
}

// One step of k from shared memory. Columns from `columns` on do not exist and cost nothing in units of 8. Floats of A
// in a product of 16-bit elements are taken in three parts, which hold all their digits.
template <typename P, typename TA>
__device__ inline void multiply(const TA* a, int pitch_a, const typename P::Element* b, int64_t columns,
                                typename P::Sum (&acc)[kAccumulators]) {
  constexpr int pitch_b = kPitch<P>;
  if constexpr (P::tensor) {
    using E = typename P::Element;
    constexpr int kPartsA = std::is_same_v<TA, E> ? P::parts : 3, kPartsB = P::parts;
    constexpr int kHalf = 16 / sizeof(typename P::Element);  // 8 halves or 4 floats: half the depth of one mma
    constexpr int kPer = kHalf / 4;                          // elements of a 32-bit word
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4 * kPer;
    const int row = warp / 2 * 32 + group, column = warp % 2 * 32 + group;
#pragma unroll
    for (int k = 0; k < kStep<P>; k += 2 * kHalf) {
      FragmentA fa[2][kPartsA];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t word[kPartsA];
          words<E>(a + (row + 16 * m + i % 2 * 8) * pitch_a + k + in_group + i / 2 * kHalf, word);
#pragma unroll
          for (int part = 0; part < kPartsA; ++part) fa[m][part].x[i] = word[part];
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (warp % 2 * 32 + 8 * n >= columns) continue;
        FragmentB fb[kPartsB];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t word[kPartsB];
          words<E>(b + (column + 8 * n) * pitch_b + k + in_group + i * kHalf, word);
#pragma unroll
          for (int part = 0; part < kPartsB; ++part) fb[part].x[i] = word[part];
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float (&sums)[4] = *reinterpret_cast<float (*)[4]>(acc + (m * 4 + n) * 4);
#pragma unroll
          for (int x = 0; x < kPartsA; ++x) {
#pragma unroll
            for (int y = 0; y < kPartsB && x + y < (kPartsA > kPartsB ? kPartsA : kPartsB); ++y) {
              mma<E>(sums, fa[m][x], fb[y]);
            }
          }
        }
      }
    }
  } else {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int k = 0; k < kStep<P>; ++k) {
      typename P::Sum x[8], y[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = a[(row + 8 * i) * pitch_a + k];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = b[(column + 16 * j) * pitch_b + k];
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) acc[i] += x[i / 4] * y[i % 4];
    }
  }
}

template <typename P>
__device__ inline void clear(typename P::Sum (&acc)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) acc[i] = 0;
}

// The tile in shared memory, rows kTilePitch apart: for sums over rows or columns, and for what one wants to do element
// by element with coalesced addresses. A loop that indexed the accumulators by a variable would move them to local
// memory.
constexpr int kTilePitch = kTile + 1;
template <typename P>
__device__ inline void store_tile(const typename P::Sum (&acc)[kAccumulators], typename P::Sum* shared) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) shared[tile_row<P>(i) * kTilePitch + tile_column<P>(i)] = acc[i];
}

// acc += A[row_a .., :] B[row_b .., :]^T, double buffered. Ends with a barrier: the stages are free again.
template <typename P, typename X, typename Y>
__device__ void product(const X& a, int64_t row_a, const Y& b, int64_t row_b, unsigned char* stages,
                        typename P::Sum (&acc)[kAccumulators]) {
  using Element = typename P::Element;
  auto stage = [&](int64_t step, int operand) {
    return reinterpret_cast<Element*>(stages + (step % 2 * 2 + operand) * kOperandBytes);
  };
  const int64_t steps = ceil_div(a.depth, kStep<P>), columns = b.rows - row_b;
  if (steps == 0) return;
  auto load = [&](int64_t step) {
    fill<P>(stage(step, 0), a, row_a, step * kStep<P>);
    fill<P>(stage(step, 1), b, row_b, step * kStep<P>);
  };
  // Exact products sum 256 terms at a time: over thousands of patches one running sum would lose two digits.
  constexpr int kFlush = P::tensor ? 0 : 256 / kStep<P>;
  typename P::Sum part[kAccumulators];
  if constexpr (kFlush) clear<P>(part);
  load(0);
  commit_copies();
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    if constexpr (kFlush) {
      multiply<P>(stage(step, 0), kPitch<P>, stage(step, 1), columns, part);
      if ((step + 1) % kFlush == 0 || step + 1 == steps) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) acc[i] += part[i];
        clear<P>(part);
      }
    } else {
      multiply<P>(stage(step, 0), kPitch<P>, stage(step, 1), columns, acc);
    }
    __syncthreads();
  }
}

// The same with all of A in shared memory already, rows pitch_a apart, zero from column b.depth to a multiple of the
// step.
template <typename P, typename TA, typename Y>
__device__ void product_resident(const TA* a, int pitch_a, const Y& b, int64_t row_b, unsigned char* stages,
                                 typename P::Sum (&acc)[kAccumulators]) {
  using Element = typename P::Element;
  auto stage = [&](int64_t step) { return reinterpret_cast<Element*>(stages + step % 2 * kOperandBytes); };
  const int64_t steps = ceil_div(b.depth, kStep<P>), columns = b.rows - row_b;
  fill<P>(stage(0), b, row_b, 0);
  commit_copies();
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) fill<P>(stage(step + 1), b, row_b, (step + 1) * kStep<P>);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    multiply<P>(a + step * kStep<P>, pitch_a, stage(step), columns, acc);
    __syncthreads();
  }
}

}  // namespace ovseg
