// What device code needs from its compiler: launches, dynamic shared memory, 16-bit floats, warp sums.
// Under nvcc this is CUDA; with OVSEG_EMULATED it is tests/cuda_emulation, and the same files run on a CPU.
//
// A launcher returns null or the text of an error, so that the bind file can raise it.
#pragma once
#include <cstdint>

#ifdef OVSEG_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace ovseg {

using half = __half;
using bfloat16 = __nv_bfloat16;
__device__ inline float to_float(float x) { return x; }
__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
template <typename T, typename F>
__device__ inline T from_float(F x) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <typename... P, typename... A>
const char* launch(const char*, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, void* stream,
                   A... args) {
  if (shared > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  // clang-format off
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  // clang-format on
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace ovseg

#define OVSEG_NOINLINE __noinline__
#define OVSEG_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// The kernel in parentheses where its template arguments hold commas.
#define OVSEG_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ::ovseg::launch(#kernel, kernel, grid, threads, shared, stream, __VA_ARGS__)
#define OVSEG_TRY(call) \
  if (const char* error = (call)) return error

namespace ovseg {

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename A>
__device__ inline A warp_sum(A x) {
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}

// The larger one; a NaN on either side is kept.
template <typename A>
__device__ inline A larger(A x, A y) {
  return x > y || x != x ? x : y;
}

template <typename A>
__device__ inline A warp_max(A x) {
  for (int other = 16; other > 0; other /= 2) x = larger(x, __shfl_xor_sync(kFullWarp, x, other));
  return x;
}

// Of a row whose squares leave the range of A; `squared` is what they have added up to.
template <typename A, typename T>
__device__ OVSEG_NOINLINE A long_norm(const T* x, int64_t stride, int64_t count, A squared) {
  A top = 0;
  for (int64_t d = threadIdx.x % 32; d < count; d += 32) top = larger<A>(fabs(to_float(x[d * stride])), top);
  top = warp_max(top);
  if (top - top != A(0)) return squared;  // NaN or infinite itself
  A sum = 0;
  for (int64_t d = threadIdx.x % 32; d < count; d += 32) {
    const A value = to_float(x[d * stride]) / top;
    sum += value * value;
  }
  return top * sqrt(warp_sum(sum));
}

// |x| of a row, by a warp.
template <typename A, typename T>
__device__ inline A warp_norm(const T* x, int64_t stride, int64_t count) {
  A sum = 0;
  for (int64_t d = threadIdx.x % 32; d < count; d += 32) {
    const A value = to_float(x[d * stride]);
    sum += value * value;
  }
  sum = warp_sum(sum);
  return sum - sum == A(0) ? sqrt(sum) : long_norm(x, stride, count, sum);
}

// 1 / x for x from 1 to 3; of float in one instruction, within a unit of the last place.
__device__ inline float reciprocal(float x) {
#ifdef OVSEG_EMULATED
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ inline double reciprocal(double x) { return 1.0 / x; }

template <typename A>
__device__ inline A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

// log(1 + exp(x)) without overflow, and with all digits where exp(x) is small. A NaN stays one.
template <typename A>
__device__ inline A softplus_with(A x, A e) {  // where e = exp(-|x|) is known
  return (x > A(0) ? x : A(0)) + log1p(e);
}
template <typename A>
__device__ inline A softplus(A x) {
  return softplus_with<A>(x, exp(-fabs(x)));
}

__host__ __device__ inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
__host__ __device__ inline int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

}  // namespace ovseg
