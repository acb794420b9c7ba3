// dense_contrastive_loss: registration for the CPU.
#include "dense_contrastive_loss_bind.h"

#include "../common/isa.h"

namespace ovseg {
namespace {

template <typename A>
const DenseTable<A>& table() {
  return OVSEG_BEST_ISA(dense_table<A>());
}

template <typename A>
DensePair select_as(DenseInputs<A> in) {
  const DenseTable<A>& run = table<A>();
  DensePair found = in.selected();
  const DenseParams<A>& p = in.p;
  const ScalarType type = accumulation_type(in.pixels);
  const int64_t capacity = p.k_neg + p.skip, entry = sizeof(Selected<A>);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(p.B, torch::stable::get_num_threads()));
  Tensor packed = new_tensor(in.pixels, {run.packed_size(p)}, type);
  Tensor lowest = new_tensor(in.pixels, {p.T}, type);
  Tensor positives = new_tensor(in.pixels, {p.T * p.k_pos * entry}, ScalarType::Byte);
  Tensor negatives = new_tensor(in.pixels, {workers * p.T * capacity * entry}, ScalarType::Byte);
  Tensor lengths = new_tensor(in.pixels, {workers * p.T}, ScalarType::Long);
  torch::stable::zero_(lengths);
  auto* lists = reinterpret_cast<Selected<A>*>(data<unsigned char>(negatives));
  parallel_with_workspace<A>(in.pixels, p.T, run.workspace_size(p), type, [&](int64_t begin, int64_t end, A* memory) {
    auto* heaps = reinterpret_cast<Selected<A>*>(data<unsigned char>(positives));
    run.positives(p, begin, end, heaps, data<A>(lowest), memory);
  });
  run.pack(p, data<A>(packed));
  const int64_t size = run.workspace_size(p);
  Tensor memory = new_tensor(in.pixels, {workers * size}, type);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      run.negatives(p, p.B * w / workers, p.B * (w + 1) / workers, data<A>(packed), data<A>(lowest),
                    lists + w * p.T * capacity, data<int64_t>(lengths) + w * p.T, data<A>(memory) + w * size);
    }
  });
  torch::stable::parallel_for(
      0, p.T, 1, [&](int64_t begin, int64_t end) { run.merge(p, begin, end, workers, lists, data<int64_t>(lengths)); });
  return found;
}

DensePair select(Tensor pixels, Tensor texts, Optional image_ids, Optional text_ids, Optional rng, int64_t k_pos,
                 int64_t k_neg, int64_t skip, int64_t sampling, double temperature, double margin) {
  return with_dense_inputs(pixels, texts, [&](auto in) {
    in.enter_selection(image_ids, text_ids, rng, k_pos, k_neg, skip, sampling, temperature, margin);
    return select_as(in);
  });
}

// run.function over [0, count), with workspaces.
template <typename A, typename Work>
void parallel(const DenseInputs<A>& in, int64_t count, const Work& work) {
  parallel_with_workspace<A>(in.pixels, count, table<A>().workspace_size(in.p), accumulation_type(in.pixels),
                             [&](int64_t begin, int64_t end, A* memory) { work(in.p, begin, end, memory); });
}

// A kernel would read wherever these point to.
void check_range(const char* name, const int64_t* x, int64_t count, int64_t least, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(x[i] >= least && x[i] < end, name, " holds ", x[i], "; expected ", least, " to ", end - 1);
  }
}

DensePair gather(Tensor pixels, Tensor texts, Tensor index, int64_t rows) {
  return with_dense_inputs(pixels, texts, [&](auto in) {
    in.enter_index(index, rows);
    check_range("index", in.p.index, in.p.T * in.p.K, -1, in.p.B * in.p.N);
    DensePair found = in.gathered();
    parallel(in, in.p.T, table<std::remove_pointer_t<decltype(in.p.similarity)>>().gather);
    return found;
  });
}

DensePair backward(Optional grad_similarity, Optional grad_unit, Tensor pixels, Tensor texts, Tensor index,
                   Tensor order, int64_t rows, bool need_pixels, bool need_texts) {
  return with_dense_inputs(pixels, texts, [&](auto in) {
    in.enter_index(index, rows), in.enter_gradients(grad_similarity, grad_unit, order);
    check_range("index", in.p.index, in.p.T * in.p.K, -1, in.p.B * in.p.N);
    check_range("order", in.p.order, in.p.T * in.p.K, 0, in.p.T * in.p.K);
    DensePair found = in.gradients(need_pixels, need_texts);
    const auto& run = table<std::remove_pointer_t<decltype(in.p.similarity)>>();
    if (need_texts) parallel(in, in.p.T, run.texts);
    if (need_pixels) parallel(in, in.p.T * in.p.K, run.pixels);
    return found;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ovseg, CPU, m) {
  m.impl("dense_contrastive_select", TORCH_BOX(&select));
  m.impl("dense_contrastive_gather", TORCH_BOX(&gather));
  m.impl("dense_contrastive_gather_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
