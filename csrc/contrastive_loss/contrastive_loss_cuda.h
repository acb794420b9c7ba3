// contrastive_loss on CUDA: parameters, memory plan and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "contrastive_loss.h"

namespace ovseg {

// The parameters of the CPU, with what only the device may read given by address.
template <typename A>
struct ContrastiveCuda {
  ContrastiveParams<A> p;  // scale, bias and grad unused
  const A *scale, *bias, *grad;
  A *grad_scale, *grad_bias;
  bool tf32;  // products of float32 features may round to tf32
  unsigned char* workspace;
  void* stream;
};

// Bytes that the block of d logits aims at.
#ifdef OVSEG_EMULATED
inline int64_t contrastive_limit = int64_t(64) << 20;  // a test lowers it, so that a small batch takes several chunks
#else
constexpr int64_t contrastive_limit = int64_t(64) << 20;
#endif

template <typename A>
size_t contrastive_workspace(const ContrastiveParams<A>& p, bool backward);
template <typename A>
const char* contrastive_statistics(const ContrastiveCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* contrastive_gradient(const ContrastiveCuda<A>& x);

}  // namespace ovseg
