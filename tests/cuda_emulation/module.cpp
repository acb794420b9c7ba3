// The test-only module: guarded memory, the emulation's own tests, and torch-free pieces of csrc. Importing it also
// registers the CUDA bind files under torch.ops.ovseg_emulated.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/common/philox.h"
#include "../../csrc/dense_contrastive_loss/dense_contrastive_loss_cuda.h"
#include "../../csrc/patch_text_similarity/patch_text_similarity_cuda.h"
#include "cuda_emulation.h"
#include "selftest.h"

namespace py = pybind11;
namespace emulation = ovseg::emulation;
namespace selftest = ovseg::selftest;

namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(ovseg_cuda_emulation, m) {
  m.def("take_steps", &emulation::take_steps, "Basic blocks run, of each kernel since the last call.");
  m.def("take_launches", &emulation::take_launches, "The kernels launched since the last call, in order.");
  m.def("set_seed", &emulation::set_seed, "Seed of the order in which threads run.");
  m.def(
      "allocate",
      [](size_t bytes) {
        using Holder = std::shared_ptr<unsigned char>;
        auto* holder = new Holder(emulation::allocate(bytes));
        const py::capsule owner(holder, [](void* at) { delete static_cast<Holder*>(at); });
        return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes), holder->get(), owner);
      },
      "Guarded memory, full of NaN, as a numpy array of bytes.");
  m.def("release_all", [] {
    const std::string found = emulation::release_all();
    if (!found.empty()) throw std::runtime_error(found);
  });

  m.def("reverse", [](uintptr_t x, uintptr_t y, int blocks, bool barrier) {
    check(selftest::reverse(at<float>(x), at<float>(y), blocks, barrier));
  });
  m.def("tree", [](uintptr_t x, uintptr_t y, bool race) { check(selftest::tree(at<float>(x), at<float>(y), race)); });
  m.def("warps", [](uintptr_t x, uintptr_t y, uintptr_t counts) {
    check(selftest::warps(at<float>(x), at<float>(y), at<float>(counts)));
  });
  m.def("blocks", [](uintptr_t x, uintptr_t y) { check(selftest::blocks(at<float>(x), at<float>(y))); });
  m.def("out_of_bounds",
        [](uintptr_t y, int64_t index, bool shared) { check(selftest::out_of_bounds(at<float>(y), index, shared)); });
  m.def("divergent", [](int kind, uintptr_t y) { check(selftest::divergent(kind, at<float>(y))); });
  m.def("copies", [](uintptr_t x, uintptr_t y, int valid, bool early) {
    check(selftest::copies(at<float>(x), at<float>(y), valid, early));
  });
  m.def("product",
        [](int kind, uintptr_t a, uintptr_t b, uintptr_t c, int64_t depth, bool a_by_k, bool b_by_k, int64_t pitch) {
          check(selftest::product(kind, at<void>(a), at<void>(b), at<void>(c), depth, a_by_k, b_by_k, pitch));
        });
  m.def("philox_on_device", [](uintptr_t rng, int64_t first, int64_t count, uintptr_t low, uintptr_t high,
                               uintptr_t gumbel) {
    check(selftest::philox_numbers(at<int64_t>(rng), first, count, at<float>(low), at<float>(high), at<float>(gumbel)));
  });

  m.def("philox", [](uint64_t key, uint64_t low, uint64_t high) {
    const ovseg::Philox block = ovseg::philox(key, low, high);
    return py::make_tuple(block.x[0], block.x[1], block.x[2], block.x[3]);
  });
  m.def("philox_bits", &ovseg::philox_bits);
  m.def("uniform_from_bits", &ovseg::uniform_from_bits);
  m.def("gumbel_from_bits", &ovseg::gumbel_from_bits);
  m.def("set_dense_limit", [](int64_t bytes) { ovseg::dense_limit = bytes; });
  m.def("set_patch_text_limit", [](int64_t bytes) { ovseg::patch_text_limit = bytes; });
  m.def("patch_text_plan", [](int64_t B, int64_t T, int64_t N, int64_t D, int pool, int type, bool backward) {
    ovseg::PatchTextCuda p{};
    p.B = B, p.T = T, p.N = N, p.D = D;
    p.pool = static_cast<ovseg::Pool>(pool), p.type = static_cast<ovseg::Type>(type);
    const ovseg::PatchTextPlan plan = ovseg::patch_text_plan(p, backward);
    return py::dict(py::arg("gram") = plan.gram, py::arg("chunk") = plan.chunk, py::arg("slots") = plan.slots,
                    py::arg("bytes") = plan.bytes);
  });
}
