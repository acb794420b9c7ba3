// A small SIMT emulation: .cu files compile as C++ and run one block at a time, its threads as fibers on one CPU
// thread.
//
// What it proves: indexing, masks, algebra, shared-memory hand-over (a missing barrier shows as a wrong result because
// the scheduler visits threads in a seeded random order), divergent barriers, accesses past the end of a buffer, reads
// of memory nobody wrote (all memory starts as NaN). What it cannot: timing, memory-model subtleties, occupancy. Static
// __shared__ arrays are not guarded and keep what the block before left: kernels here use dynamic shared memory. A
// warp's lanes meet only in warp operations; everything between two synchronisation points runs thread by thread.
//
// It counts steps: the basic blocks that all threads of a kernel have gone through, a stand-in for executed
// instructions by which the costs of two inputs can be compared. What an mma or a warp operation does inside costs
// nothing.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define OVSEG_NOINLINE __attribute__((noinline))
#define OVSEG_UNCOUNTED __attribute__((noinline, no_sanitize_coverage))
#ifndef __align__
#define __align__(n) alignas(n)
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace ovseg::emulation {

constexpr int kWarp = 32;
constexpr int kSlotBytes = 128;  // what one lane can hand over in one warp operation

struct Identity {
  dim3 thread, block, block_size, grid;
};
const Identity& identity();

void block_barrier(int line);        // __syncthreads at this line of the source
void warp_barrier(unsigned mask);    // all lanes of the mask meet
unsigned char* warp_slot(int lane);  // kSlotBytes of the calling thread's warp
int lane();
[[noreturn]] void fail(const std::string& message);  // ends the launch; reported with kernel, block and thread
void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_async();
void wait_async(int pending);  // all but the last `pending` groups have arrived
unsigned char* dynamic_shared();

// Runs the kernel; returns null, or the first error as text that lives until the next launch.
const char* launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
std::map<std::string, uint64_t> take_steps();  // of each kernel since the last call
std::vector<std::string> take_launches();      // the kernels launched since the last call, in order
void set_seed(uint64_t seed);                  // of the order in which threads run

// "Device memory": ends at a page that may not be touched, starts as NaN, and is checked for writes before its start.
// The emulation looks after it until release_all, which says what was overwritten; a holder keeps it readable for
// longer.
std::shared_ptr<unsigned char> allocate(size_t bytes);
std::string release_all();

template <typename T>
OVSEG_UNCOUNTED T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= kSlotBytes && std::is_trivially_copyable_v<T>);
  std::memcpy(warp_slot(lane()), &value, sizeof(T));
  warp_barrier(mask);
  if (!(mask >> source & 1))
    fail("a warp operation reads lane " + std::to_string(source) + ", which is not in its mask");
  T result;
  std::memcpy(&result, warp_slot(source), sizeof(T));
  warp_barrier(mask);
  return result;
}

}  // namespace ovseg::emulation

#define threadIdx (::ovseg::emulation::identity().thread)
#define blockIdx (::ovseg::emulation::identity().block)
#define blockDim (::ovseg::emulation::identity().block_size)
#define gridDim (::ovseg::emulation::identity().grid)
#define __syncthreads() ::ovseg::emulation::block_barrier(__LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { ::ovseg::emulation::warp_barrier(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return ovseg::emulation::exchange(mask, value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return ovseg::emulation::exchange(mask, value, ovseg::emulation::lane() ^ other);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int source = ovseg::emulation::lane() + delta;
  return ovseg::emulation::exchange(mask, value, source < 32 ? source : ovseg::emulation::lane());
}
OVSEG_UNCOUNTED inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  const unsigned mine = predicate != 0;
  std::memcpy(ovseg::emulation::warp_slot(ovseg::emulation::lane()), &mine, sizeof(mine));
  ovseg::emulation::warp_barrier(mask);
  for (int i = 0; i < 32; ++i) {
    unsigned bit = 0;
    if (mask >> i & 1) std::memcpy(&bit, ovseg::emulation::warp_slot(i), sizeof(bit));
    result |= bit << i;
  }
  ovseg::emulation::warp_barrier(mask);
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = before < value ? value : before;
  return before;
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

namespace ovseg {

// 16-bit floats as their bits; arithmetic goes through float, as the kernels do it.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof(value));
  return static_cast<float>(value);
}
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename T, typename F>
T from_float(F x) {
  if constexpr (std::is_same_v<T, half>) {
    const _Float16 value = static_cast<_Float16>(static_cast<float>(x));
    half result;
    std::memcpy(&result.bits, &value, sizeof(value));
    return result;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const float value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value == value) bits += 0x7fff + (bits >> 16 & 1);  // to nearest even
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

template <typename... P, typename... A>
const char* launch(const char* name, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, void*,
                   A... args) {
  return emulation::launch(name, grid, dim3(threads), shared, [&] { kernel(args...); });
}

}  // namespace ovseg

#define OVSEG_DYNAMIC_SHARED(name) unsigned char* name = ::ovseg::emulation::dynamic_shared()
