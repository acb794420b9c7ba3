// center_assignment on CUDA: parameters and entry points. No torch and no device code here.
#pragma once
#include <cstddef>

#include "center_assignment.h"

namespace ovseg {

constexpr int kFewCenters = 8;            // that one kernel serves
constexpr int64_t kFewChannels = 1024;    // of keys and of values, likewise
constexpr size_t kBlockBytes = 99 << 10;  // of shared memory that a block may have on every chip since sm_80

OVSEG_ANYWHERE int64_t center_flags(int64_t L) { return (L + 63) / 64 * 2; }  // one for each warp of tokens

template <typename A>
struct CenterCuda {
  CenterParams<A> p;
  unsigned char* workspace;
  void* stream;
};

OVSEG_ANYWHERE constexpr int few_tokens(size_t element_bytes) { return static_cast<int>(32 / element_bytes); }

// How the kernels for few centers cut a call, and their shared memory: see center_assignment_few.cuh.
struct FewPlan {
  bool fits;                // else the kernels for many centers answer
  bool same;                // values are the keys: they are read once
  int splits, tokens;       // blocks of an image, and the tokens of each; what they find is added in order
  int pitch, scaled_pitch;  // from row to row in shared memory: tokens and queries, d pooled
  size_t bytes;
};
template <typename A>
FewPlan few_plan(const CenterParams<A>& p, bool backward);

// What lies between the kernels, in the workspace.
template <typename A>
struct CenterBuffers {
  A *sums, *counts;       // few centers in several splits: [B, splits, G, E or D] and [B, splits, G]
                          // many centers:
  A *weights, *d_scores;  // [B, L, G]: of the soft forward and the backward; d z of (7)
  A *scaled, *rho;        // [B, G, E] d pooled / n, and [B, G] rho / n
  int32_t* spoiled;       // [B, tiles of L, 2], forward: whether a token of a warp has a softmax of NaN
  A* wide;                // [B, tiles of L, 1 or 2, 64, G + 1] scores that shared memory cannot hold, or null
  A* tallies;             // [B, blocks, 2, G] counts of each block that pools, likewise
  size_t bytes;           // of all of these
};
OVSEG_ANYWHERE_MEMBER int center_pitch(int64_t G) { return static_cast<int>(G) + 1; }
template <typename A>
size_t score_bytes(int64_t G) {  // of 64 tokens with all centers
  return 64 * center_pitch(G) * sizeof(A);
}
constexpr int64_t kPoolThreads = 32;  // of a block that pools
constexpr int64_t kPoolStage = 128;   // tokens whose centers lie in its shared memory at a time
template <typename A>
size_t pool_bytes(int64_t G, int64_t channels) {  // of its shared memory, with so many channels a thread
  return G * (kPoolThreads * channels * sizeof(A) + sizeof(A) + 4) + kPoolStage * 4;
}
template <typename A>
CenterBuffers<A> center_buffers(const CenterParams<A>& p, bool backward, unsigned char* workspace);
template <typename A>
size_t center_workspace(const CenterParams<A>& p, bool backward);
template <typename A>
const char* center_forward(const CenterCuda<A>& x);  // null, or the text of an error
template <typename A>
const char* center_backward(const CenterCuda<A>& x);

}  // namespace ovseg
