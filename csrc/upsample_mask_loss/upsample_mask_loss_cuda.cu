// upsample_mask_loss on CUDA. A thread walks down a column of labels, through the rows of a run: between two rows of
// samples all it needs of the map are two numbers. Forward: some blocks share a map, sum (2) and (3) over their tiles,
// and a second kernel adds their parts in order. Backward: a block owns some rows of samples of a map. It gathers (5)
// of the output rows around them; rows between two blocks are computed by both, so that nothing needs atomics.
// Equation numbers: ovseg_kernels/ops/upsample_mask_loss.py.
#include "../common/block.cuh"
#include "../common/places.cuh"
#include "upsample_mask_loss_cuda.h"

namespace ovseg {
namespace {

constexpr unsigned kPixelThreads = kMaskLossColumns;
// Blocks that shall fit on a multiprocessor: registers for six of float, four of double, and none spills.
template <typename A>
constexpr int kResident = sizeof(A) == 4 ? 6 : 4;

// log(1 + e) for 0 <= e <= 1: the series of 2 atanh(z), z = e / (2 + e), fitted for z <= 1/3 to a relative 4e-9.
__device__ inline float log1p_of_exp(float e) {
  const float z = e * reciprocal(2.0f + e), s = z * z;
  float series = 0.281577784f;
  series = series * s + 0.279651577f;
  series = series * s + 0.400245952f;
  series = series * s + 0.666663216f;
  series = series * s + 2.00000001f;
  return z * series;
}
__device__ inline double log1p_of_exp(double e) { return log1p(e); }

// Everything (2) and (5) need of one pixel. Logarithms by softplus: log(1 - q) would be -infinity from x = 17 on.
template <typename A>
struct Pixel {
  A q, v, softplus, slope;  // sigmoid(x), sigmoid(-t), softplus(-t), q (1 - q)

  __device__ Pixel(A x, bool positive) {
    const A e = exp(-fabs(x)), large = reciprocal(A(1) + e), small = e * large, t = positive ? x : -x;
    q = x < A(0) ? small : large;
    v = t < A(0) ? large : small;
    softplus = (t < A(0) ? -t : A(0)) + log1p_of_exp(e);
    slope = large * small;
  }
};

template <bool kSquare, typename A>
__device__ inline A power_of(A v, A gamma) {
  if constexpr (kSquare) return v * v;
  return pow(v, gamma);
}

// A column of outputs between the samples to its left and right, in two neighbouring rows of them.
template <typename A>
struct Column {
  const A* map;
  int64_t w;
  Place<A> x;
  int32_t row = -1;  // of the samples above
  A above, below;

  __device__ Column(const A* map_, int64_t w_, const Place<A>& x_) : map(map_), w(w_), x(x_) {}
  __device__ void move_to(const Place<A>& y) {
    row = y.low;
    const A *top = map + y.low * w, *bottom = map + y.high * w;
    above = x.to_low * top[x.low] + x.to_high * top[x.high];
    below = x.to_low * bottom[x.low] + x.to_high * bottom[x.high];
  }
  __device__ A at(const Place<A>& y) const { return y.to_low * above + y.to_high * below; }  // (1)
};

// Blocks: (map, split). Each sums the tiles split, split + splits, ... of kMaskLossRows x kMaskLossColumns labels.
template <typename A, bool kSquare>
__global__ void __launch_bounds__(kPixelThreads, kResident<A>)
    upsample_mask_loss_fwd_kernel(MaskLossParams<A> p, int64_t splits, double* parts) {
  OVSEG_DYNAMIC_SHARED(memory);
  Place<A>* rows = reinterpret_cast<Place<A>*>(memory);                 // [kMaskLossRows]
  double* shared = reinterpret_cast<double*>(rows + kMaskLossRows);  // [5 a warp]
  const int64_t plane = blockIdx.x, across = ceil_div(p.W, kMaskLossColumns);
  const int32_t c = static_cast<int32_t>(plane % p.C);
  const int32_t* codes = p.codes + plane / p.C * p.H * p.W;
  const A negative = A(1) - p.alpha;
  double total[5] = {0, 0, 0, 0, 0};
  for (int64_t tile = blockIdx.y; tile < mask_loss_tiles(p); tile += splits) {
    const int64_t Y0 = tile / across * kMaskLossRows, X = tile % across * kMaskLossColumns + threadIdx.x;
    const int32_t count = static_cast<int32_t>(p.H - Y0 < kMaskLossRows ? p.H - Y0 : kMaskLossRows);
    __syncthreads();  // the rows of the tile before are read
    fill_places<kPixelThreads>(rows, Y0, count, p.h, p.H);
    __syncthreads();
    if (X >= p.W) continue;
    Column<A> column(p.logits + plane * p.h * p.w, p.w, place_of<A>(X, p.w, p.W));
    const int32_t* code = codes + Y0 * p.W + X;
    A focal = 0, q = 0, qy = 0;  // float for a run of at most kMaskLossRows, double for all others
    int32_t y = 0, pixels = 0;
#pragma unroll 4
    for (int32_t i = 0; i < count; ++i, code += p.W) {
      const Place<A> row = rows[i];
      if (row.low != column.row) column.move_to(row);
      const bool positive = *code == c, counts = *code != kIgnored;
      const Pixel<A> at(column.at(row), positive);
      const A weight = positive ? p.alpha : negative;
      if (counts) focal += weight * (power_of<kSquare>(at.v, p.gamma) * at.softplus), q += at.q, ++pixels;
      if (positive) qy += at.q, ++y;
    }
    total[0] += focal, total[1] += q, total[2] += qy, total[3] += y, total[4] += pixels;
  }
  __syncthreads();
  block_sum<kPixelThreads>(total, shared);
  if (threadIdx.x == 0) {
    for (int64_t k = 0; k < 5; ++k) parts[(blockIdx.y * 5 + k) * p.B * p.C + plane] = total[k];
  }
}

template <typename A>
__global__ void __launch_bounds__(kPixelThreads)
    upsample_mask_loss_finish_kernel(MaskLossParams<A> p, int64_t splits, const double* parts) {
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * kPixelThreads + threadIdx.x, maps = p.B * p.C;
  if (plane >= maps) return;
  double sum[5] = {0, 0, 0, 0, 0};
  for (int64_t split = 0; split < splits; ++split) {
    for (int64_t k = 0; k < 5; ++k) sum[k] += parts[(split * 5 + k) * maps + plane];
  }
  finish_mask_loss(p, plane, sum);
}

// What the columns of a block have gathered between two rows of samples, for the row above and the row below.
template <typename A>
struct Gathered {
  A above[kPixelThreads], below[kPixelThreads];
  Place<A> x[kPixelThreads];

  // On to the samples of `grad`, rows [begin, end) of which belong to this block. The first column of each cell walks
  // through it. All threads call; `columns` of them hold one.
  __device__ void spread(A* grad, int64_t w, int64_t begin, int64_t end, int32_t row, int32_t row_below,
                         int32_t columns) const {
    __syncthreads();
    const int32_t first = threadIdx.x;
    const bool walks = first < columns && (first == 0 || x[first].low != x[first - 1].low);
    double part[4] = {0, 0, 0, 0};  // above left, above right, below left, below right
    if (walks) {
      for (int32_t i = first; i < columns && x[i].low == x[first].low; ++i) {
        part[0] += x[i].to_low * above[i], part[1] += x[i].to_high * above[i];
        part[2] += x[i].to_low * below[i], part[3] += x[i].to_high * below[i];
      }
    }
    auto add = [&](int64_t sample_row, int32_t column, double value) {
      if (begin <= sample_row && sample_row < end) grad[sample_row * w + column] += static_cast<A>(value);
    };
    if (walks) add(row, x[first].low, part[0]), add(row_below, x[first].low, part[2]);
    __syncthreads();  // the cell to the right adds to the same column
    if (walks) add(row, x[first].high, part[1]), add(row_below, x[first].high, part[3]);
    __syncthreads();
  }
};

// Blocks: (map, kMaskLossSamples rows of samples).
template <typename A, bool kSquare>
__global__ void __launch_bounds__(kPixelThreads, kResident<A>) upsample_mask_loss_bwd_kernel(MaskLossParams<A> p) {
  OVSEG_DYNAMIC_SHARED(memory);
  Place<A>* rows = reinterpret_cast<Place<A>*>(memory);  // [kMaskLossRows]
  Gathered<A>& gathered = *reinterpret_cast<Gathered<A>*>(rows + kMaskLossRows);
  const int64_t plane = blockIdx.x;
  const int32_t c = static_cast<int32_t>(plane % p.C);
  const int32_t* codes = p.codes + plane / p.C * p.H * p.W;
  const MaskLossWeights<A> weights = mask_loss_weights(p, plane);
  const A focal_y = -p.alpha * weights.focal, focal_rest = (A(1) - p.alpha) * weights.focal;
  const A dice_y = weights.dice - weights.dice_y;
  A* grad = p.grad + plane * p.h * p.w;
  const int64_t s0 = static_cast<int64_t>(blockIdx.y) * kMaskLossSamples;
  const int64_t s1 = s0 + kMaskLossSamples < p.h ? s0 + kMaskLossSamples : p.h;
  for (int64_t i = s0 * p.w + threadIdx.x; i < s1 * p.w; i += kPixelThreads) grad[i] = A(0);
  const int64_t Y0 = s0 ? first_output<A>(s0 - 1, p.h, p.H) : 0, Y1 = first_output<A>(s1, p.h, p.H);
  for (int64_t X0 = 0; X0 < p.W; X0 += kPixelThreads) {
    const int32_t columns = static_cast<int32_t>(p.W - X0 < kPixelThreads ? p.W - X0 : kPixelThreads);
    const bool mine = static_cast<int32_t>(threadIdx.x) < columns;
    const int64_t X = mine ? X0 + threadIdx.x : X0;
    const Place<A> x = place_of<A>(X, p.w, p.W);
    gathered.x[threadIdx.x] = x;
    Column<A> column(p.logits + plane * p.h * p.w, p.w, x);
    const int32_t* code = codes + Y0 * p.W + X;
    int32_t row_below = -1;
    A above = 0, below = 0;  // sums of (5) since the row of samples last changed
    auto spread = [&] {
      gathered.above[threadIdx.x] = above, gathered.below[threadIdx.x] = below;
      gathered.spread(grad, p.w, s0, s1, column.row, row_below, columns);
    };
    for (int64_t Y = Y0; Y < Y1; Y += kMaskLossRows) {
      const int32_t count = static_cast<int32_t>(Y1 - Y < kMaskLossRows ? Y1 - Y : kMaskLossRows);
      __syncthreads();  // the rows before are read
      fill_places<kPixelThreads>(rows, Y, count, p.h, p.H);
      __syncthreads();
      for (int32_t i = 0; i < count; ++i, code += p.W) {
        const Place<A> y = rows[i];
        if (y.low != column.row) {  // for all threads alike
          if (column.row >= 0) spread();
          column.move_to(y);
          row_below = y.high, above = below = A(0);
        }
        const bool positive = *code == c;
        const Pixel<A> at(column.at(y), positive);
        const A bend = power_of<kSquare>(at.v, p.gamma) * (p.gamma * (A(1) - at.v) * at.softplus + at.v);
        const A slope = (positive ? focal_y : focal_rest) * bend + (positive ? dice_y : weights.dice) * at.slope;
        if (*code != kIgnored) above += y.to_low * slope, below += y.to_high * slope;
      }
    }
    if (column.row >= 0) spread();
  }
}

template <typename A>
const char* forward_on_device(const MaskLossParams<A>& p, double* parts, void* stream) {
  const int64_t splits = mask_loss_splits(p);
  const dim3 grid(static_cast<unsigned>(p.B * p.C), static_cast<unsigned>(splits));
  const size_t shared = kMaskLossRows * sizeof(Place<A>) + 5 * kPixelThreads / 32 * sizeof(double);
  if (p.gamma == A(2)) {
    return OVSEG_LAUNCH((upsample_mask_loss_fwd_kernel<A, true>), grid, kPixelThreads, shared, stream, p, splits,
                        parts);
  }
  return OVSEG_LAUNCH((upsample_mask_loss_fwd_kernel<A, false>), grid, kPixelThreads, shared, stream, p, splits, parts);
}

}  // namespace

template <typename A>
const char* upsample_mask_loss_on_device(const MaskLossParams<A>& p, double* parts, void* stream) {
  const int64_t maps = p.B * p.C;
  if (maps == 0) return nullptr;
  OVSEG_TRY(forward_on_device(p, parts, stream));
  const unsigned blocks = static_cast<unsigned>(ceil_div(maps, kPixelThreads));
  return OVSEG_LAUNCH(upsample_mask_loss_finish_kernel<A>, blocks, kPixelThreads, 0, stream, p, mask_loss_splits(p),
                      parts);
}

template <typename A>
const char* upsample_mask_loss_backward_on_device(const MaskLossParams<A>& p, void* stream) {
  if (p.B == 0) return nullptr;
  const int64_t runs = ceil_div(p.h, kMaskLossSamples);
  if (runs > 65535) return "more than 524280 rows of samples; use OVSEG_BACKEND=reference";
  const dim3 grid(static_cast<unsigned>(p.B * p.C), static_cast<unsigned>(runs));
  const size_t shared = kMaskLossRows * sizeof(Place<A>) + sizeof(Gathered<A>);
  if (p.gamma == A(2)) {
    return OVSEG_LAUNCH((upsample_mask_loss_bwd_kernel<A, true>), grid, kPixelThreads, shared, stream, p);
  }
  return OVSEG_LAUNCH((upsample_mask_loss_bwd_kernel<A, false>), grid, kPixelThreads, shared, stream, p);
}

template const char* upsample_mask_loss_on_device(const MaskLossParams<float>&, double*, void*);
template const char* upsample_mask_loss_on_device(const MaskLossParams<double>&, double*, void*);
template const char* upsample_mask_loss_backward_on_device(const MaskLossParams<float>&, void*);
template const char* upsample_mask_loss_backward_on_device(const MaskLossParams<double>&, void*);

}  // namespace ovseg
