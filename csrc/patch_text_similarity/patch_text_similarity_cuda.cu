// patch_text_similarity on CUDA, sm_80 and newer: the memory plan, and the way to the code of each kind of arithmetic.
// Kernels: _fwd.cuh and _bwd.cuh; launches: _launch.cuh.
//
// Texts lie on the rows of a tile, patches on its columns. Raw operands go into the products, the float sums are scaled
// by the norms. Forward: the cosines of 64 texts with up to 256 patches stay in shared memory; |v| comes from the Gram
// matrix of the image (N within one window), or from the pooled vectors, whose weights go through memory, a chunk of
// images at a time. Backward: recompute, turn cosines into coefficients per chunk, then plain products. Every output
// element has one owner and every sum a fixed order: two runs give the same bits.
#include <algorithm>

#include "../common/device_workspace.h"
#include "../common/tile.cuh"
#include "patch_text_similarity_cuda.h"

namespace ovseg {

PatchTextPlan patch_text_plan(const PatchTextCuda& p, bool backward) {
  const bool wide = p.type == Type::float64;
  const int64_t a = wide ? 8 : 4, w = wide ? 8 : p.type == Type::bfloat16 ? 2 : 4;
  PatchTextPlan plan{};
  plan.gram = p.N <= patch_text_window(wide);
  plan.pitch = round_up(p.N, 8), plan.pitch_d = round_up(p.D, 8);
  const bool vector = p.pool == Pool::vector, pooled = vector && !plan.gram;
  const int64_t text_tiles = ceil_div(p.T, kTile), patch_tiles = ceil_div(p.N, kTile);
  const int64_t gram_size = vector && plan.gram ? p.N * plan.pitch * w : 0;
  const int64_t weight_size = pooled || (backward && vector) ? p.T * plan.pitch * w : 0;
  const int64_t vector_size = backward && pooled ? p.T * plan.pitch_d * w : 0;
  const int64_t coefficient_size = backward ? p.T * plan.pitch * w : 0;
  const int64_t along_size = backward ? text_tiles * p.N * a : 0;
  const int64_t scalar_size = backward ? 16 * text_tiles * patch_tiles : 0;
  const int64_t cancelled_size = vector && !backward ? 8 * text_tiles : 0;
  const int64_t per_image =
      cancelled_size + 2 * gram_size + weight_size + vector_size + coefficient_size + along_size + scalar_size + 1;
  const int64_t limit = patch_text_limit / per_image;
  plan.chunk = limit < 1 ? 1 : limit > 65535 ? 65535 : limit;
  if (plan.chunk > p.B) plan.chunk = p.B < 1 ? 1 : p.B;
  // Enough blocks for a large GPU where texts and channels alone do not give them.
  const int64_t owners = text_tiles * ceil_div(p.D, kTile), wanted = ceil_div(256, owners);
  plan.slots = wanted < plan.chunk ? wanted : plan.chunk;
  if (plan.slots > 16) plan.slots = 16;
  DeviceWorkspace memory(p.workspace);
  auto take = [&](int64_t bytes) { return memory.take<unsigned char>(bytes); };
  plan.norms = take(plan.chunk * p.N * a);
  plan.longest = take(plan.chunk * a);
  plan.text_norms = take(p.T * a);
  plan.gram_matrix = take(plan.chunk * gram_size);
  plan.hessian = take(backward ? plan.chunk * gram_size : 0);
  const int64_t scratch = round_up(p.D, kTile) * kTile * a;  // of a block of cancelled_kernel, in their place
  const int64_t all_weights = std::max(plan.chunk * weight_size, pooled && !backward ? scratch : 0);
  plan.weights = take(all_weights);
  plan.cancelled_blocks = all_weights / scratch;
  plan.vectors = take(plan.chunk * vector_size);
  plan.coefficients = take(plan.chunk * coefficient_size);
  plan.along = take(plan.chunk * along_size);
  plan.factors = take(backward && vector ? plan.chunk * p.T * a : 0);
  plan.best = take(backward && p.pool == Pool::max ? plan.chunk * p.T * 4 : 0);
  plan.cancelled = take(plan.chunk * cancelled_size);
  plan.cancelled_count = take(cancelled_size ? 4 : 0);
  plan.scalars = take(backward ? 16 + plan.chunk * scalar_size : 0);
  plan.slot_texts = take(backward ? plan.slots * p.T * p.D * a : 0);
  plan.bytes = memory.bytes();
  return plan;
}

#define OVSEG_DECLARE(kind)                                      \
  const char* patch_text_forward_##kind(const PatchTextCuda& p); \
  const char* patch_text_backward_##kind(const PatchTextCuda& p);
OVSEG_PATCH_TEXT_KINDS(OVSEG_DECLARE)

#define OVSEG_DISPATCH(function)                                         \
  switch (p.type) {                                                      \
    case Type::float64:                                                  \
      return function##_Float64(p);                                      \
    case Type::float16:                                                  \
      return function##_Float16(p);                                      \
    case Type::bfloat16:                                                 \
      return function##_BFloat16(p);                                     \
    default:                                                             \
      return p.tf32 ? function##_Float32Fast(p) : function##_Float32(p); \
  }

const char* patch_text_forward(const PatchTextCuda& p) { OVSEG_DISPATCH(patch_text_forward) }
const char* patch_text_backward(const PatchTextCuda& p) { OVSEG_DISPATCH(patch_text_backward) }

}  // namespace ovseg
