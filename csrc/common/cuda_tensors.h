// What the CUDA bind files need beyond tensors.h: the device and stream of a call, and where they register.
#pragma once
#include "tensors.h"

#ifdef OVSEG_EMULATED
#define OVSEG_LIBRARY ovseg_emulated  // tests/cuda_emulation calls these with CPU tensors
#define OVSEG_DEVICE_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define OVSEG_LIBRARY ovseg
#define OVSEG_DEVICE_KEY CUDA
#endif

namespace ovseg {

// Makes the tensor's device current while it lives.
class OnDevice {
 public:
#ifdef OVSEG_EMULATED
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline void check_launch(const char* op, const char* error) { STD_TORCH_CHECK(error == nullptr, op, ": ", error); }

// Memory of a launch. It may go when the launch is queued: the allocator hands it on in the order of the stream.
inline Tensor workspace_of(const Tensor& like, size_t bytes) {
  return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// One element on the tensor's device, read by the kernels themselves.
inline const void* device_scalar(const char* name, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.numel() == 1, name, " has ", x.numel(), " elements; expected 1");
  check_type(name, x, type);
  return x.const_data_ptr();
}

}  // namespace ovseg
