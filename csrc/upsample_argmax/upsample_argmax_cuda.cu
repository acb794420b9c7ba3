// upsample_argmax on CUDA: a block owns the pixels of one cell, between four samples. It finds the classes that can win
// there, (4), and interpolates only those. The sample at the upper left is its own: it looks for numbers that are
// refused. Equation numbers: ovseg_kernels/ops/upsample_argmax.py.
#include "../common/candidates.cuh"
#include "../common/places.cuh"
#include "upsample_argmax_cuda.h"

namespace ovseg {
namespace {

constexpr int32_t kSide = 32;   // pixels a side whose positions are kept at once
constexpr int32_t kPixels = 2;  // of a thread, which share the samples of a class

// The cell between the samples (y, x), (y, right), (below, x) and (below, right) of every class.
template <typename A>
struct Cell {
  const A *image, *bias;
  int64_t plane, place;  // elements of a map; of the upper left sample in it
  int64_t right, below;  // elements from that sample to its neighbours

  struct Corners {
    A upper_left, upper_right, lower_left, lower_right;
  };
  __device__ Corners corners(int32_t c) const {
    const A* at = image + c * plane + place;
    return {at[0], at[right], at[below], at[below + right]};
  }
  __device__ A added(int32_t c) const { return bias ? bias[c] : A(0); }
};

// Whether class c holds what is refused, as far as its sample of this cell tells: NaN, or infinities of both signs in a
// map. Of two of these the positive one looks for the other.
template <typename A>
__device__ bool refused(const Cell<A>& cell, int32_t c) {
  const A* map = cell.image + c * cell.plane;
  const A add = cell.added(c), mine = map[cell.place] + add;
  if (mine < static_cast<A>(INFINITY)) return false;
  if (mine != mine) return true;
  for (int64_t i = 0; i < cell.plane; ++i) {
    if (!(map[i] + add > minus_infinity<A>())) return true;
  }
  return false;
}

template <typename A>
__global__ void __launch_bounds__(kPruningThreads) upsample_argmax_fwd_kernel(UpsampleParams<A> p) {
  OVSEG_DYNAMIC_SHARED(memory);
  Place<A>* columns = reinterpret_cast<Place<A>*>(memory);    // [kSide]
  Place<A>* rows = columns + kSide;                           // [kSide]
  int64_t* edges = reinterpret_cast<int64_t*>(rows + kSide);  // the pixels of the cell: X0, X1, Y0, Y1
  const int64_t x = blockIdx.x, y = blockIdx.y, b = blockIdx.z;
  const int32_t classes = static_cast<int32_t>(p.C);
  const Cell<A> cell{p.logits + b * p.C * p.h * p.w, p.bias, p.h * p.w, y * p.w + x, x + 1 < p.w ? 1 : 0,
                     y + 1 < p.h ? p.w : 0};
  if (p.flag) {
    for (int32_t c = threadIdx.x; c < classes; c += kPruningThreads) {
      if (refused(cell, c)) *p.flag = 1;
    }
  }
  if (threadIdx.x < 4) {
    const bool across = threadIdx.x < 2;
    edges[threadIdx.x] = first_output<A>((across ? x : y) + threadIdx.x % 2, across ? p.w : p.h, across ? p.W : p.H);
  }
  __syncthreads();
  const int64_t X0 = edges[0], X1 = edges[1], Y0 = edges[2], Y1 = edges[3];
  if (X0 >= X1 || Y0 >= Y1) return;  // of the whole block
  auto bounds = [&](int32_t c, A& least, A& most) {
    const typename Cell<A>::Corners at = cell.corners(c);
    const A add = cell.added(c);
    least = fmin(fmin(at.upper_left, at.upper_right), fmin(at.lower_left, at.lower_right)) + add;
    most = fmax(fmax(at.upper_left, at.upper_right), fmax(at.lower_left, at.lower_right)) + add;
  };
  unsigned char* rest = reinterpret_cast<unsigned char*>(edges + 4);
  const Candidates<A> found = find_candidates<A>(classes, rest, bounds);

  // The pixels [0, width * height) of a part of the cell, row by row.
  auto label_part = [&](int64_t Ya, int64_t Xa, int32_t height, int32_t width) {
    for (int32_t first = threadIdx.x; first < width * height; first += kPixels * kPruningThreads) {
      Place<A> v[kPixels], u[kPixels];
      A best[kPixels];
      int32_t winner[kPixels];
#pragma unroll
      for (int32_t k = 0; k < kPixels; ++k) {
        const int32_t i = first + k * static_cast<int32_t>(kPruningThreads), row = i / width;
        v[k] = rows[row < height ? row : 0], u[k] = columns[row < height ? i % width : 0];
        best[k] = minus_infinity<A>(), winner[k] = found.list[0];
      }
      for (int32_t n = 0; n < found.count; ++n) {
        const int32_t c = found.list[n];
        const typename Cell<A>::Corners at = cell.corners(c);
        const A add = cell.added(c);
#pragma unroll
        for (int32_t k = 0; k < kPixels; ++k) {
          const A left = weighted(v[k].to_low, at.upper_left) + weighted(v[k].to_high, at.lower_left);
          const A right = weighted(v[k].to_low, at.upper_right) + weighted(v[k].to_high, at.lower_right);
          const A value = weighted(u[k].to_low, left) + weighted(u[k].to_high, right) + add;  // (2)
          if (n == 0 || value > best[k]) best[k] = value, winner[k] = c;
        }
      }
#pragma unroll
      for (int32_t k = 0; k < kPixels; ++k) {
        const int32_t i = first + k * static_cast<int32_t>(kPruningThreads);
        if (i < width * height) put_label(p, (b * p.H + Ya + i / width) * p.W + Xa + i % width, winner[k], best[k]);
      }
    }
  };
  for (int64_t Y = Y0; Y < Y1; Y += kSide) {
    for (int64_t X = X0; X < X1; X += kSide) {
      const int32_t height = static_cast<int32_t>(Y1 - Y < kSide ? Y1 - Y : kSide);
      const int32_t width = static_cast<int32_t>(X1 - X < kSide ? X1 - X : kSide);
      __syncthreads();  // the positions of the part before are read
      fill_places<kPruningThreads>(rows, Y, height, p.h, p.H);
      fill_places<kPruningThreads>(columns, X, width, p.w, p.W);
      __syncthreads();
      label_part(Y, X, height, width);
    }
  }
}

}  // namespace

template <typename A>
const char* upsample_argmax_on_device(const UpsampleParams<A>& p, void* stream) {
  const size_t shared = 2 * kSide * sizeof(Place<A>) + 4 * sizeof(int64_t) + candidates_bytes<A>(p.C);
  if (shared > 99 * 1024) return "more than 23000 classes; use OVSEG_BACKEND=reference";
  if (p.h > 65535 || p.B > 65535) return "more than 65535 rows of samples or images; use OVSEG_BACKEND=reference";
  if (p.B == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(p.w), static_cast<unsigned>(p.h), static_cast<unsigned>(p.B));
  return OVSEG_LAUNCH(upsample_argmax_fwd_kernel<A>, grid, kPruningThreads, shared, stream, p);
}

template const char* upsample_argmax_on_device(const UpsampleParams<float>&, void*);
template const char* upsample_argmax_on_device(const UpsampleParams<double>&, void*);

}  // namespace ovseg
