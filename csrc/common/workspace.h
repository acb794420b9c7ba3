// One block of memory for the arrays of a thread. Included by files that are compiled once per instruction set.
#pragma once
#include <cstdint>

namespace ovseg {
namespace OVSEG_ISA {

// Hands out arrays of any type, each on cache lines of its own. Without a base it only counts elements of A.
template <typename A>
class Arena {
 public:
  explicit Arena(A* base) : base_(base) {}

  template <typename X>
  X* take(int64_t elements) {
    X* at = base_ ? reinterpret_cast<X*>(base_ + size_) : nullptr;
    const int64_t unit = static_cast<int64_t>(sizeof(A)), bytes = elements * static_cast<int64_t>(sizeof(X));
    size_ += ((bytes + unit - 1) / unit + kLine - 1) / kLine * kLine;
    return at;
  }
  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kLine = 16;  // floats; two lines of doubles
  A* base_;
  int64_t size_ = 0;
};

template <typename A>
A smaller(A x, A y) {
  return y < x ? y : x;
}
template <typename A>
A larger(A x, A y) {
  return y > x ? y : x;
}

}  // namespace OVSEG_ISA
}  // namespace ovseg
