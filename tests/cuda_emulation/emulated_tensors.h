// Tensors of a bind file under the emulation: outputs and workspaces live in guarded memory that starts as NaN. They
// are gone after release_all: the caller copies what it keeps.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda_emulation.h"

namespace ovseg::emulation {

inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                        torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  int64_t count = 1;
  std::vector<int64_t> strides(size.size());
  for (size_t i = size.size(); i-- > 0;) {
    strides[i] = count;
    count *= size[i] < 1 ? 1 : size[i];
  }
  for (int64_t n : size) count = n == 0 ? 0 : count;
  int64_t element = 8;
  if (type == ScalarType::Float || type == ScalarType::Int) element = 4;
  if (type == ScalarType::Half || type == ScalarType::BFloat16) element = 2;
  if (type == ScalarType::Byte || type == ScalarType::Bool) element = 1;
  return torch::stable::from_blob(allocate(static_cast<size_t>(count * element)).get(), {size.data(), size.size()},
                                  {strides.data(), strides.size()}, like.device(), type);
}

}  // namespace ovseg::emulation
