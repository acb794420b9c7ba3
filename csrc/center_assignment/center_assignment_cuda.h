// center_assignment on CUDA: parameters and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "center_assignment.h"

namespace ovseg {

constexpr int64_t kMaxCenters = 128;  // 64 in float64: their scores for 64 tokens lie in shared memory

template <typename A>
struct CenterCuda {
  CenterParams<A> p;
  unsigned char* workspace;
  void* stream;
};

// Bytes of the workspace: weights [B, L, G] of the soft forward; d scores, weights, d pooled / n and rho of the
// backward.
template <typename A>
size_t center_workspace(const CenterParams<A>& p, bool backward);
template <typename A>
const char* center_forward(const CenterCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* center_backward(const CenterCuda<A>& x);

}  // namespace ovseg
