// center_assignment on CUDA: parameters and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "center_assignment.h"

namespace ovseg {

constexpr int64_t kMaxCenters = 128;  // 64 in float64: their scores for 64 tokens lie in shared memory

OVSEG_ANYWHERE int64_t center_flags(int64_t L) { return (L + 63) / 64 * 2; }  // one for each warp of tokens

template <typename A>
struct CenterCuda {
  CenterParams<A> p;
  unsigned char* workspace;
  void* stream;
};

// What lies between the kernels, in the workspace.
template <typename A>
struct CenterBuffers {
  A *weights, *d_scores;  // [B, L, G]: of the soft forward and the backward; d z of (7)
  A *scaled, *rho;        // [B, G, E] d pooled / n, and [B, G] rho / n
  int32_t* spoiled;       // [B, tiles of L, 2], forward: whether a token of a warp has a softmax of NaN
  size_t bytes;           // of all of these
};
template <typename A>
CenterBuffers<A> center_buffers(const CenterParams<A>& p, bool backward, unsigned char* workspace);
template <typename A>
size_t center_workspace(const CenterParams<A>& p, bool backward);
template <typename A>
const char* center_forward(const CenterCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* center_backward(const CenterCuda<A>& x);

}  // namespace ovseg
