// similarity_contrastive_loss on the CPU. Rows and columns have one owner each: the bits do not depend on the threads.
#include <cmath>
#include <limits>
#include <vector>

#include "similarity_contrastive_loss.h"

namespace ovseg {
namespace {

constexpr int64_t kColumnBlock = 64;  // columns walked together, so that a cache line of a row is read once

// log sum exp with a running maximum; keeps NaN.
template <typename A>
struct LogSumExp {
  A top = -std::numeric_limits<A>::infinity();
  A sum = 0;
  void add(A x) {
    if (x <= top) {
      sum += x == top ? A(1) : std::exp(x - top);
    } else {  // a new maximum, or a NaN
      sum = sum * std::exp(top - x) + A(1);
      top = x;
    }
  }
  A value() const { return sum == A(0) ? -std::numeric_limits<A>::infinity() : top + std::log(sum); }
};

template <typename A>
struct Statistics {
  LogSumExp<A> lse;
  A hits = 0;    // sum of p z
  A weight = 0;  // sum of p
  void add(const SimilarityLossParams<A>& p, int64_t i, int64_t j) {
    if (!p.kept(i, j)) return;
    const A z = p.scale * p.similarity[i * p.strides[0] + j * p.strides[1]];
    lse.add(z);
    const A positive = p.weight(i, j);
    if (positive != A(0)) {  // zero times an infinite z is NaN
      hits += positive * z;
      weight += positive;
    }
  }
  void store(A* out, int64_t index, int64_t stride) const {
    out[index] = lse.value();
    out[index + stride] = hits;
    out[index + 2 * stride] = weight;
  }
};

}  // namespace

template <typename A>
void similarity_loss_rows(const SimilarityLossParams<A>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Statistics<A> row;
    for (int64_t j = 0; j < p.T; ++j) row.add(p, i, j);
    row.store(p.rows, i, p.B);
  }
}

template <typename A>
void similarity_loss_columns(const SimilarityLossParams<A>& p, int64_t begin, int64_t end) {
  for (int64_t j0 = begin; j0 < end; j0 += kColumnBlock) {
    const int64_t j1 = j0 + kColumnBlock < end ? j0 + kColumnBlock : end;
    std::vector<Statistics<A>> columns(static_cast<size_t>(j1 - j0));
    for (int64_t i = 0; i < p.B; ++i) {
      for (int64_t j = j0; j < j1; ++j) columns[static_cast<size_t>(j - j0)].add(p, i, j);
    }
    for (int64_t j = j0; j < j1; ++j) columns[static_cast<size_t>(j - j0)].store(p.columns, j, p.T);
  }
}

// Equation (4): dL/dz, then d similarity = scale dz and d scale = sum dz similarity.
template <typename A>
void similarity_loss_backward(const SimilarityLossParams<A>& p, int64_t begin, int64_t end) {
  const A *column_lse = p.columns, *column_sum = p.columns + 2 * p.T;  // of p
  for (int64_t i = begin; i < end; ++i) {
    const A row_lse = p.rows[i], row_sum = p.rows[2 * p.B + i], row_weight = p.row_weight[i];
    double d_scale = 0;
    for (int64_t j = 0; j < p.T; ++j) {
      A& out = p.grad_similarity[i * p.T + j];
      if (!p.kept(i, j)) {
        out = A(0);
        continue;
      }
      const A phi = p.similarity[i * p.strides[0] + j * p.strides[1]];
      const A z = p.scale * phi;
      A dz = 0;  // a row or column of weight 0 has no positive and may have no finite log-sum-exp
      if (row_weight != A(0)) dz += row_weight * std::exp(z - row_lse);
      if (p.column_weight[j] != A(0)) dz += p.column_weight[j] * std::exp(z - column_lse[j]);
      const A positive = p.weight(i, j);
      if (positive != A(0)) dz -= row_weight * (positive / row_sum) + p.column_weight[j] * (positive / column_sum[j]);
      dz *= p.grad;
      out = p.scale * dz;
      d_scale += static_cast<double>(dz) * static_cast<double>(phi);
    }
    p.row_scale[i] = d_scale;
  }
}

template void similarity_loss_rows<float>(const SimilarityLossParams<float>&, int64_t, int64_t);
template void similarity_loss_rows<double>(const SimilarityLossParams<double>&, int64_t, int64_t);
template void similarity_loss_columns<float>(const SimilarityLossParams<float>&, int64_t, int64_t);
template void similarity_loss_columns<double>(const SimilarityLossParams<double>&, int64_t, int64_t);
template void similarity_loss_backward<float>(const SimilarityLossParams<float>&, int64_t, int64_t);
template void similarity_loss_backward<double>(const SimilarityLossParams<double>&, int64_t, int64_t);

}  // namespace ovseg
