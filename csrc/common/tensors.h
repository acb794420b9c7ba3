// What the bind files need of torch's stable ABI: checks, types, allocation, a parallel loop with one workspace a task.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

#ifdef OVSEG_EMULATED
#include "emulated_tensors.h"
#endif

namespace ovseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
#ifdef OVSEG_EMULATED
  return emulation::new_tensor(like, size, type);  // guarded, and full of NaN
#endif
  // As torch::stable::new_empty, which prints a page of frames where there is no memory.
  using torch::stable::detail::from;
  const std::optional<torch::headeronly::Layout> layout;
  const std::optional<torch::stable::Device> device;
  const std::optional<bool> pinned;
  std::array<StableIValue, 6> stack{from(like),
                                    from(torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size())),
                                    from(std::optional<ScalarType>(type)),
                                    from(layout),
                                    from(device),
                                    from(pinned)};
  if (torch_call_dispatcher("aten::new_empty", "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    std::string shape;
    for (const int64_t n : size) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
    throw std::runtime_error("out of memory: no room for a tensor [" + shape +
                             "]; its inputs have asked for too much at once");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool is_floating(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return true;
    default:
      return false;
  }
}

inline Type type_code(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Type::float64;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      return Type::float32;
  }
}

// Sums and outputs are double for double inputs and float for all others.
inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.mutable_data_ptr());
}

// Python has checked already; this keeps a direct call of torch.ops.ovseg.* from reading out of bounds.
inline void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), name, " has ", x.dim(), " dimensions; expected ",
                  shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    STD_TORCH_CHECK(x.size(i) == shape[i], name, " has size ", x.size(i), " in dimension ", i, "; expected ", shape[i]);
  }
}

inline void check_type(const char* name, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has another dtype than the kernel expects");
}

// work(begin, end, workspace) over [0, count), at most one range a thread, each with a workspace of its own. The ranges
// depend on the number of threads: what work() computes for an item must not depend on its neighbours.
template <typename A, typename Work>
void parallel_with_workspace(const Tensor& like, int64_t count, int64_t workspace_size, ScalarType type,
                             const Work& work) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()));
  Tensor memory = new_tensor(like, {workers * workspace_size}, type);
  A* base = data<A>(memory);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      work(count * worker / workers, count * (worker + 1) / workers, base + worker * workspace_size);
    }
  });
}

}  // namespace ovseg
