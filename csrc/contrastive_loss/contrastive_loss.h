// contrastive_loss: parameters and entry points. No torch and no device code here.
// Formulas: ovseg_kernels/ops/contrastive_loss.py; the equation numbers in the kernels are of that docstring.
#pragma once
#include "../common/types.h"

namespace ovseg {

// A is the type of features and of all sums: float or double. Everything is contiguous.
template <typename A>
struct ContrastiveParams {
  int64_t B, T, D;
  const A *image, *text;     // [B, D] and [T, D]
  const int64_t* image_ids;  // [B] and [T], or null: the positive of row i is column i + offset
  const int64_t* text_ids;
  // With a list of pairs in place of ids, image_ids [B + 1 + P] says where the pairs of each image begin, with their
  // end, and behind that the text of every pair, rising in each image; text_ids [T + 1 + P] the same of texts.
  bool listed;
  const A* pair_weights;  // [2, P] in the order of images, then in that of texts
  int64_t pairs;
  int64_t offset;
  bool sigmoid;
  A scale, bias;  // CPU only

  A* rows;     // [3, B]: log-sum-exp (sigmoid: the row's loss), sum of positive logits, number of positives
  A* columns;  // [3, T]: the same over the rows (sigmoid: zero)

  // Backward only. Null for a gradient that is not wanted.
  A grad;                  // CPU only
  const A* row_weight;     // [B]
  const A* column_weight;  // [T]
  A *grad_image, *grad_text;
};

// The first place from begin to end where x, which rises, is at least `least`.
OVSEG_ANYWHERE int64_t first_at_least(const int64_t* x, int64_t begin, int64_t end, int64_t least) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (x[middle] < least) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The CPU works off blocks of rows; a task of a block owns `width` columns. Functions of the shapes alone, so that the
// order of every sum is too.
struct ContrastivePlan {
  int64_t rows, width, tasks, slices;  // slices: of 64 channels, tasks of the image gradient
};
constexpr int64_t kContrastiveChunk = 512;  // depth of one step of the image gradient's product
OVSEG_ANYWHERE ContrastivePlan contrastive_plan(int64_t B, int64_t T, int64_t D) {
  ContrastivePlan plan{};
  const int64_t fits = (int64_t(2) << 20) / (T < 1 ? 1 : T) / 12 * 12;  // the block of d logits stays near 2 M elements
  plan.rows = fits < 48 ? 48 : fits > 240 ? 240 : fits;
  if (plan.rows > B) plan.rows = B < 1 ? 1 : B;
  const int64_t width = (T / 32 + 63) / 64 * 64;
  plan.width = width < 64 ? 64 : width > 256 ? 256 : width;
  plan.tasks = (T + plan.width - 1) / plan.width;
  plan.slices = (D + 63) / 64;
  return plan;
}

// One table per instruction set.
template <typename A>
struct ContrastiveTable {
  int64_t (*workspace_size)(const ContrastiveParams<A>&);  // elements of A for one thread
  int64_t (*packed_size)(const ContrastiveParams<A>&);     // of the texts, for either product
  int64_t (*packed_rows_size)(const ContrastiveParams<A>&);
  void (*pack_columns)(const ContrastiveParams<A>&, int64_t begin, int64_t end, A* packed);  // tasks
  void (*pack_chunks)(const ContrastiveParams<A>&, int64_t begin, int64_t end, A* packed);   // chunks of texts
  void (*pack_rows)(const ContrastiveParams<A>&, int64_t first, int64_t count, int64_t begin, int64_t end, A* packed);
  // Forward, tasks of a block of rows: partial statistics [tasks, count, 2] of its rows, running ones [2, T] of
  // columns.
  void (*stats)(const ContrastiveParams<A>&, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
                A* row_partial, A* column_state, A* workspace);
  void (*finish_rows)(const ContrastiveParams<A>&, int64_t first, int64_t count, const A* row_partial);
  void (*finish_columns)(const ContrastiveParams<A>&, const A* column_state);
  // Backward: d logits times scale [count, T] of a block; sums [tasks, 2] of d scale and d bias.
  void (*logits)(const ContrastiveParams<A>&, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
                 A* d_logits, double* sums, A* workspace);
  void (*image)(const ContrastiveParams<A>&, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
                const A* d_logits, A* workspace);  // slices
  void (*text)(const ContrastiveParams<A>&, int64_t first, int64_t count, int64_t begin, int64_t end, const A* packed,
               const A* d_logits, A* workspace);  // tasks
};

OVSEG_PER_ISA(template <typename A> const ContrastiveTable<A>& contrastive_table();)

}  // namespace ovseg
