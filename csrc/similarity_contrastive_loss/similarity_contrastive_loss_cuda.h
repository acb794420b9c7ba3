// similarity_contrastive_loss on CUDA: entry points. No torch and no device code here.
#pragma once
#include "similarity_contrastive_loss.h"

namespace ovseg {

// The parameters of the CPU, with what only the device may read given by address.
template <typename A>
struct SimilarityLossCuda {
  SimilarityLossParams<A> p;  // scale and grad unused
  const A *scale, *grad;
  A* grad_scale;
  void* stream;
};

template <typename A>
const char* similarity_loss_stats(const SimilarityLossCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* similarity_loss_gradient(const SimilarityLossCuda<A>& x);

}  // namespace ovseg
