// dense_contrastive_loss: registration for CUDA, and the products of a library.
#include <array>

#include "../common/cuda_tensors.h"
#include "dense_contrastive_loss_bind.h"
#include "dense_contrastive_loss_cuda.h"

namespace ovseg {
namespace {

// The kernels walk all pixels with one stride.
Tensor even_rows(const Tensor& pixels) {
  const bool even = pixels.dim() != 3 || pixels.size(0) < 2 || pixels.stride(0) == pixels.size(1) * pixels.stride(1);
  return even ? pixels : torch::stable::contiguous(pixels);
}

// Products of 16-bit operands with sums and results in float32.
class LibraryProduct final : public DenseProduct {
 public:
  LibraryProduct(const Tensor& pixels, int64_t texts)
      : pixels_(torch::stable::reshape(pixels, {pixels.size(0) * pixels.size(1), pixels.size(2)})),
        halves_(new_tensor(pixels, {2 * texts, pixels.size(2)}, pixels.scalar_type())) {
    halves = halves_.mutable_data_ptr();
  }

  const float* run(int64_t first, int64_t count) override {
    Tensor pixels = torch::stable::narrow(pixels_, 0, first, count);
    found_ = product(halves_, torch::stable::transpose(pixels, 0, 1));
    return data<float>(found_);
  }

 private:
  static Tensor product(const Tensor& a, const Tensor& b) {
#ifdef OVSEG_EMULATED  // the CPU has no such product
    return torch::stable::matmul(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float));
#else
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(ScalarType::Float)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
#endif
  }

  Tensor pixels_, halves_, found_;
};

template <typename A>
DenseCuda<A> on_device(const DenseInputs<A>& in, const Tensor& memory, const OnDevice& device) {
  return {in.p, data<unsigned char>(memory), device.stream(), nullptr};
}

DensePair select(Tensor pixels, Tensor texts, Optional image_ids, Optional text_ids, Optional rng, int64_t k_pos,
                 int64_t k_neg, int64_t skip, int64_t sampling, double temperature, double margin) {
  return with_dense_inputs(even_rows(pixels), texts, [&](auto in) {
    const OnDevice device(in.pixels);
    in.enter_selection(image_ids, text_ids, rng, k_pos, k_neg, skip, sampling, temperature, margin);
    DensePair found = in.selected();
    const Tensor memory = workspace_of(in.pixels, dense_select_workspace(in.p));
    auto call = on_device(in, memory, device);
    std::optional<LibraryProduct> product;
    if (dense_halves(in.p)) call.product = &product.emplace(in.pixels, in.p.T);
    check_launch("dense_contrastive_select", dense_select(call));
    return found;
  });
}

DensePair gather(Tensor pixels, Tensor texts, Tensor index, int64_t rows) {
  return with_dense_inputs(even_rows(pixels), texts, [&](auto in) {
    const OnDevice device(in.pixels);
    in.enter_index(index, rows);
    DensePair found = in.gathered();
    check_launch("dense_contrastive_gather", dense_gather(on_device(in, workspace_of(in.pixels, 0), device)));
    return found;
  });
}

DensePair backward(Optional grad_similarity, Optional grad_unit, Tensor pixels, Tensor texts, Tensor index,
                   Tensor order, int64_t rows, bool need_pixels, bool need_texts) {
  return with_dense_inputs(even_rows(pixels), texts, [&](auto in) {
    const OnDevice device(in.pixels);
    in.enter_index(index, rows), in.enter_gradients(grad_similarity, grad_unit, order);
    DensePair found = in.gradients(need_pixels, need_texts);
    const Tensor memory = workspace_of(in.pixels, dense_backward_workspace(in.p));
    check_launch("dense_contrastive_gather_backward", dense_backward(on_device(in, memory, device)));
    return found;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OVSEG_LIBRARY, OVSEG_DEVICE_KEY, m) {
  m.impl("dense_contrastive_select", TORCH_BOX(&select));
  m.impl("dense_contrastive_gather", TORCH_BOX(&gather));
  m.impl("dense_contrastive_gather_backward", TORCH_BOX(&backward));
}

}  // namespace ovseg
