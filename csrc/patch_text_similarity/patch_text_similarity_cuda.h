// patch_text_similarity on CUDA: parameters, memory plan and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "patch_text_similarity.h"

namespace ovseg {

// A is double for float64 inputs and float for all others. Strides are in elements; every dimension may have any
// stride.
struct PatchTextCuda {
  int64_t B, T, N, D;
  Pool pool;
  Weight weight;
  Type type;
  bool tf32;  // products of float32 inputs may round to tf32
  const void* patches;
  int64_t patch_strides[3];
  const void* texts;
  int64_t text_strides[2];
  const bool* mask;
  int64_t mask_strides[2];
  const void *scale, *bias;  // one A each, on the device: reading them on the host would stall

  void *similarity, *lse, *norm;  // [B, T] of A; lse is null for max, norm unless vector

  // Backward only. Null for a gradient that is not wanted.
  const void* grad;
  void *grad_patches, *grad_texts, *grad_scale, *grad_bias;

  unsigned char* workspace;
  void* stream;
};

// What lies where in the workspace, and how large that must be. Images are worked off in chunks that keep it near 64
// MiB.
struct PatchTextPlan {
  bool gram;                 // Gram form, else the pooled vectors themselves
  int64_t chunk;             // images at a time
  int64_t slots;             // partial sums of the text gradient, a function of the shapes alone
  int64_t pitch;             // of rows of N elements, a multiple of 16 bytes
  int64_t pitch_d;           // of rows of D elements
  int64_t cancelled_blocks;  // of cancelled_kernel for whose v there is room where the weights were
  unsigned char *norms, *longest, *text_norms, *gram_matrix, *weights, *vectors, *coefficients, *along, *factors,
      *hessian, *best, *cancelled, *cancelled_count, *scalars, *slot_texts;  // null while p.workspace is
  size_t bytes;
};

// Bytes a chunk of images aims at.
#ifdef OVSEG_EMULATED
inline int64_t patch_text_limit = int64_t(64) << 20;  // a test lowers it, so that a small batch takes several chunks
#else
constexpr int64_t patch_text_limit = int64_t(64) << 20;
#endif

// What a kind is: patch_text_similarity_fwd.cuh. The list stands in CMakeLists.txt too, one object file each.
#define OVSEG_PATCH_TEXT_KINDS(each) each(Float64) each(Float32) each(Float32Fast) each(Float16) each(BFloat16)

// Patches whose cosines a block holds at once, and so the most for which the Gram form is taken.
constexpr int patch_text_window(bool float64) { return float64 ? 64 : 256; }

PatchTextPlan patch_text_plan(const PatchTextCuda& p, bool backward);
const char* patch_text_forward(const PatchTextCuda& p);  // null, or the text of an error
const char* patch_text_backward(const PatchTextCuda& p);

}  // namespace ovseg
