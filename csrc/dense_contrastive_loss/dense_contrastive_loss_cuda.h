// dense_contrastive_loss on CUDA: parameters and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "dense_contrastive_loss.h"

namespace ovseg {

// What multiplies 16-bit pixels with texts: a library, which the kernels know nothing of.
struct DenseProduct {
  void* halves = nullptr;  // [2, T, D] in the pixels' type, written before the first run
  // The halves times `count` pixels from `first` on, [2, T, count]: queued, and there until the next run.
  virtual const float* run(int64_t first, int64_t count) = 0;

 protected:
  ~DenseProduct() = default;
};

// The rows of pixels are equally spaced: strides[0] = N strides[1].
template <typename A>
struct DenseCuda {
  DenseParams<A> p;
  unsigned char* workspace;
  void* stream;
  DenseProduct* product = nullptr;  // where dense_halves(p), for the selection
};

template <typename A>
bool dense_halves(const DenseParams<A>& p) {
  return p.type == Type::float16 || p.type == Type::bfloat16;
}

// Bytes that the similarities of a chunk of pixels aim at: they stay in the second-level cache of an A100 or H100.
#ifdef OVSEG_EMULATED
inline int64_t dense_limit = int64_t(32) << 20;  // a test lowers it, so that a small batch takes several chunks
#else
constexpr int64_t dense_limit = int64_t(32) << 20;
#endif

template <typename A>
size_t dense_select_workspace(const DenseParams<A>& p);
template <typename A>
size_t dense_backward_workspace(const DenseParams<A>& p);
template <typename A>
const char* dense_select(const DenseCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* dense_gather(const DenseCuda<A>& x);
template <typename A>
const char* dense_backward(const DenseCuda<A>& x);

}  // namespace ovseg
