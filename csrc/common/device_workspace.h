// The arrays of a launch in one block of device memory. An operator writes their sizes once, in a function that takes
// them from a DeviceWorkspace: without memory it counts the bytes, with that many bytes it finds the addresses.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ovseg {

class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(unsigned char* memory = nullptr) : memory_(memory) {}

  // Room for elements of any type, on a line of its own; null while it only counts.
  template <typename X>
  X* take(int64_t elements) {
    unsigned char* at = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (static_cast<size_t>(elements) * sizeof(X) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<X*>(at);
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kLine = 256;
  unsigned char* memory_;
  size_t bytes_ = 0;
};

}  // namespace ovseg
