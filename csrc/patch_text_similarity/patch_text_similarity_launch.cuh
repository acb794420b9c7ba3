// patch_text_similarity on CUDA: the launches for one kind of arithmetic. CMakeLists.txt makes one .cu file a kind from
// this one, so that they compile side by side.
#pragma once
#include <algorithm>

#include "patch_text_similarity_bwd.cuh"
#include "patch_text_similarity_cancelled.cuh"
#include "patch_text_similarity_cuda.h"

namespace ovseg {
namespace {

template <typename K>
Args<K> arguments(const PatchTextCuda& p, const PatchTextPlan& plan) {
  using A = typename K::A;
  Args<K> x{};
  x.T = p.T, x.N = p.N, x.D = p.D, x.pitch = plan.pitch, x.pitch_d = plan.pitch_d;
  x.pool = p.pool, x.weight = p.weight, x.gram = plan.gram, x.slots = plan.slots;
  x.patches = static_cast<const typename K::T*>(p.patches), x.texts = static_cast<const typename K::T*>(p.texts);
  x.patch_b = p.patch_strides[0], x.patch_n = p.patch_strides[1], x.patch_d = p.patch_strides[2];
  x.text_t = p.text_strides[0], x.text_d = p.text_strides[1];
  x.mask = p.mask, x.mask_b = p.mask_strides[0], x.mask_n = p.mask_strides[1];
  x.scale = static_cast<const A*>(p.scale), x.bias = static_cast<const A*>(p.bias);
  x.similarity = static_cast<A*>(p.similarity), x.lse = static_cast<A*>(p.lse), x.norm = static_cast<A*>(p.norm);
  x.grad = static_cast<const A*>(p.grad);
  x.grad_patches = static_cast<typename K::T*>(p.grad_patches);
  x.grad_texts = static_cast<typename K::T*>(p.grad_texts);
  x.norms = reinterpret_cast<A*>(plan.norms), x.longest = reinterpret_cast<A*>(plan.longest);
  x.text_norms = reinterpret_cast<A*>(plan.text_norms);
  x.gram_matrix = reinterpret_cast<typename K::G*>(plan.gram_matrix);
  x.gram_back = reinterpret_cast<typename K::W*>(plan.gram_matrix);
  x.weights = reinterpret_cast<typename K::W*>(plan.weights);
  x.vectors = reinterpret_cast<typename K::W*>(plan.vectors);
  x.coefficients = reinterpret_cast<typename K::W*>(plan.coefficients);
  x.hessian = reinterpret_cast<typename K::W*>(plan.hessian);
  x.along = reinterpret_cast<A*>(plan.along), x.factors = reinterpret_cast<A*>(plan.factors);
  x.slot_texts = reinterpret_cast<A*>(plan.slot_texts);
  x.best = p.grad && p.pool == Pool::max ? reinterpret_cast<int32_t*>(plan.best) : nullptr;
  x.cancelled = reinterpret_cast<uint32_t*>(plan.cancelled);
  x.cancelled_blocks = p.pool == Pool::vector && !p.grad ? reinterpret_cast<int32_t*>(plan.cancelled_count) : nullptr;
  x.scalars = reinterpret_cast<double*>(plan.scalars);
  return x;
}

unsigned tiles(int64_t n) { return static_cast<unsigned>(ceil_div(n, kTile)); }

template <typename K>
const char* prepare(Args<K>& x, const PatchTextCuda& p, int64_t images) {
  if (x.first == 0) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.T, kThreads / 32));
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_text_norms_kernel<K>, blocks, kThreads, 0, p.stream, x));
  }
  const unsigned count = static_cast<unsigned>(images);
  return OVSEG_LAUNCH(patch_text_similarity_patch_norms_kernel<K>, count, kThreads, 64, p.stream, x);
}

template <typename K>
const char* weights(Args<K>& x, const PatchTextCuda& p, unsigned images) {
  const dim3 grid(tiles(p.T), tiles(p.N), images);
  return OVSEG_LAUNCH(patch_text_similarity_weights_kernel<K>, grid, kThreads, kStages<typename K::A>, p.stream, x);
}

template <typename K>
const char* forward(const PatchTextCuda& p) {
  using A = typename K::A;
  const PatchTextPlan plan = patch_text_plan(p, false);
  Args<K> x = arguments<K>(p, plan);
  for (x.first = 0; x.first < p.B; x.first += plan.chunk) {
    const unsigned images = static_cast<unsigned>(p.B - x.first < plan.chunk ? p.B - x.first : plan.chunk);
    OVSEG_TRY(prepare(x, p, images));
    if (p.pool == Pool::vector && plan.gram) {
      const dim3 grid(tiles(p.N), tiles(p.N), images);
      OVSEG_TRY(OVSEG_LAUNCH((patch_text_similarity_gram_kernel<K, typename K::G>), grid, kThreads, kStageBytes,
                             p.stream, x, x.gram_matrix));
    }
    const dim3 grid(tiles(p.T), 1, images);
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_fwd_kernel<K>, grid, kThreads, kForwardShared<A>, p.stream, x));
    if (p.pool != Pool::vector) continue;
    if (!plan.gram) {
      OVSEG_TRY(weights(x, p, images));
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_pooled_norms_kernel<K>, grid, kThreads, kStages<A>, p.stream, x));
      if (!K::Back::tensor) continue;
    }
    // v of more than one window goes through memory: that of the weights, which nobody needs any more.
    const int64_t items = images * static_cast<int64_t>(grid.x);
    const int64_t most = plan.gram ? kCancelledBlocks : std::min(kCancelledBlocks, plan.cancelled_blocks);
    const unsigned blocks = static_cast<unsigned>(std::min(items, most));
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_fwd_cancelled_kernel<K>, blocks, kThreads, kCancelledShared<A>,
                           p.stream, x, static_cast<int64_t>(images), reinterpret_cast<A*>(x.weights)));
  }
  return nullptr;
}

template <typename K>
const char* backward(const PatchTextCuda& p) {
  using A = typename K::A;
  const PatchTextPlan plan = patch_text_plan(p, true);
  Args<K> x = arguments<K>(p, plan);
  for (x.first = 0; x.first < p.B; x.first += plan.chunk) {
    const unsigned images = static_cast<unsigned>(p.B - x.first < plan.chunk ? p.B - x.first : plan.chunk);
    const dim3 square(tiles(p.N), tiles(p.N), images), cosines(tiles(p.T), tiles(p.N), images);
    OVSEG_TRY(prepare(x, p, images));
    if (p.pool == Pool::max) {  // which patch it was
      const dim3 grid(tiles(p.T), 1, images);
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_fwd_kernel<K>, grid, kThreads, kForwardShared<A>, p.stream, x));
    }
    if (p.pool == Pool::vector) {
      OVSEG_TRY(weights(x, p, images));
      if (plan.gram) {
        OVSEG_TRY(OVSEG_LAUNCH((patch_text_similarity_gram_kernel<K, typename K::W>), square, kThreads, kStageBytes,
                               p.stream, x, x.gram_back));
      } else {
        const dim3 grid(tiles(p.T), tiles(p.D), images);
        OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_vectors_kernel<K>, grid, kThreads, kStageBytes, p.stream, x));
      }
    }
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_coefficients_kernel<K>, cosines, kThreads,
                           kStages<A> + kSumBytes<A>, p.stream, x));
    const int64_t blocks = static_cast<int64_t>(cosines.x) * cosines.y * images;
    OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_scalars_kernel<A>, 1, kThreads, 64, p.stream, x.scalars, blocks,
                           x.first == 0, static_cast<A*>(p.grad_scale), static_cast<A*>(p.grad_bias)));
    if (p.grad_patches) {
      if (p.pool == Pool::vector && plan.gram) {
        OVSEG_TRY(
            OVSEG_LAUNCH(patch_text_similarity_bwd_hessian_kernel<K>, square, kThreads, kStageBytes, p.stream, x));
      }
      const dim3 grid(tiles(p.N), tiles(p.D), images);
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_patches_kernel<K>, grid, kThreads, kStageBytes, p.stream, x,
                             static_cast<int64_t>(tiles(p.T))));
    }
    if (p.grad_texts) {
      const dim3 grid(tiles(p.T), tiles(p.D), static_cast<unsigned>(plan.slots));
      OVSEG_TRY(OVSEG_LAUNCH(patch_text_similarity_bwd_texts_kernel<K>, grid, kThreads, kStageBytes, p.stream, x,
                             static_cast<int64_t>(images)));
    }
  }
  if (!p.grad_texts) return nullptr;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.T, kThreads / 32));
  return OVSEG_LAUNCH(patch_text_similarity_bwd_finish_kernel<K>, blocks, kThreads, 0, p.stream, x);
}

}  // namespace
}  // namespace ovseg

#define OVSEG_KIND(kind)                                                                       \
  namespace ovseg {                                                                            \
  const char* patch_text_forward_##kind(const PatchTextCuda& p) { return forward<kind>(p); }   \
  const char* patch_text_backward_##kind(const PatchTextCuda& p) { return backward<kind>(p); } \
  }
