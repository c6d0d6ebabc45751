// The walk's transition on CUDA: forward, backward, transposed.
//
// walk_transition_tiled_kernel: an entry is read once, in tiles (tiles.cuh); its power is stored in the
// result until the column sum is known. A thread owns a target and some rows of its window.
// walk_transition_kernel: for planes by offset, where a warp's entries are adjacent, and for cases that do
// not fit the tiles (float64, wide windows). A thread owns one target and moves along the window's rows with
// one pointer, as in the backward pass. walk_transpose_kernel: a thread owns the entries of one row of the
// window.
#include "walk/tiles.cuh"

namespace afa {
namespace {

// value * factor, rounded (almost) like a product in double: the factor is the sum of two floats. A factor
// beyond a float's range only occurs with values so small that they can be scaled up.
class Factor {
 public:
  __device__ explicit Factor(double factor) : scale_(factor > 1e38 ? 0x1p64f : 1.0f) {
    factor /= scale_;
    high_ = static_cast<float>(factor);
    low_ = static_cast<float>(factor - high_);
  }
  __device__ float times(float value) const {
    value *= scale_;
    return fmaf(value, high_, value * low_);
  }

 private:
  float scale_, high_, low_;
};
class DoubleFactor {
 public:
  __device__ explicit DoubleFactor(double factor) : factor_(factor) {}
  __device__ double times(double value) const { return value * factor_; }

 private:
  double factor_;
};
inline __device__ Factor factor_for(float, double factor) {
  return Factor(factor);
}
inline __device__ DoubleFactor factor_for(double, double factor) {
  return DoubleFactor(factor);
}

// A column's sum, as exact as in double: an error common to a column would grow with every step of a long
// walk. For floats it uses Kahan summation, as GeForce GPUs add doubles at 1/64 of the rate.
template <typename Sum>
class ColumnSum {
 public:
  __device__ void add(Sum value) {
    const Sum corrected = value - lost_, next = sum_ + corrected;
    lost_ = (next - sum_) - corrected;
    sum_ = next;
  }
  __device__ double total() const { return static_cast<double>(sum_) - static_cast<double>(lost_); }

 private:
  Sum sum_ = 0, lost_ = 0;
};

template <>
class ColumnSum<double> {
 public:
  __device__ void add(double value) { sum_ += value; }
  __device__ double total() const { return sum_; }

 private:
  double sum_ = 0;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) walk_transition_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    each_node(p, [&](const Node& node) {
      Sum* const out = static_cast<Sum*>(p.out) + b * p.stencil.size * nodes + node.index;
      ColumnSum<Sum> sum;
      with_power(p, [&](auto power) {
        Sum* entry = out;
        each_source(p, b, node, [&](int64_t, bool inside, int64_t, int64_t at) {
          const Sum value = inside ? power.of(p, to_sum<Sum>(affinity[at])) : Sum{0};
          sum.add(value);
          *entry = value;
          entry += nodes;
        });
      });
      if (!p.normalize) return;
      const auto factor = factor_for(Sum{}, 1 / (p.eps + sum.total()));
      Sum* entry = out;
#pragma unroll 4
      for (int k = 0; k < p.stencil.size; ++k, entry += nodes) *entry = factor.times(*entry);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(6))
    walk_transition_backward_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  T* out = static_cast<T*>(p.out);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    each_node(p, [&](const Node& node) {
      const Sum* const grad = static_cast<const Sum*>(p.in) + b * p.stencil.size * nodes + node.index;
      // The gradient has the index of the entry, except for by_offset, which is only a layout for reading.
      const bool in_place = p.layout != Layout::by_offset;
      with_power(p, [&](auto power) {
        Sum sum = 1, dot = 0;
        if (p.normalize) {
          sum = static_cast<Sum>(p.eps);
          const Sum* slope = grad;
          each_source(p, b, node, [&](int64_t, bool inside, int64_t, int64_t at) {
            if (inside) {
              const Sum value = power.of(p, to_sum<Sum>(affinity[at]));
              sum += value;
              dot += *slope * value;
            }
            slope += nodes;
          });
          dot /= sum;
        }
        const Sum inverse = 1 / sum;
        const Sum* slope = grad;
        each_source(p, b, node, [&](int64_t k, bool inside, int64_t source, int64_t at) {
          if (inside) {
            const Sum local = power.derivative(p, to_sum<Sum>(affinity[at]));
            out[in_place ? at : gradient_index(p, b, source, node.index, k)] =
                from_sum<T>((*slope - dot) * inverse * local);
          }
          slope += nodes;
        });
      });
    });
  }
}

// Entry k of a target is entry K - 1 - k of the source; if k increases by one, the source moves one to the
// left.
template <typename T>
__global__ void __launch_bounds__(kThreads) walk_transpose_kernel(const __grid_constant__ WalkParams p) {
  const int64_t nodes = p.height * p.width;
  for (int64_t index = blockIdx.y; index < p.batch * p.stencil.runs; index += gridDim.y) {
    const int64_t b = index / p.stencil.runs, r = index - b * p.stencil.runs;
    int64_t first = 0;
    for (int i = 0; i < r; ++i) first += p.stencil.run[i].count;
    const Run run = p.stencil.run[r];
    const T* in = static_cast<const T*>(p.in) + (b * p.stencil.size + p.stencil.size - 1 - first) * nodes;
    T* out = static_cast<T*>(p.out) + (b * p.stencil.size + first) * nodes;
    each_node(p, [&](const Node& node) {
      const int64_t sy = node.y + run.dy;
      const int64_t end = sy >= 0 && sy < p.height ? p.width : 0;
      int64_t sx = node.x + run.dx, from = sy * p.width + sx;
      T* to = out + node.index;
#pragma unroll 4
      for (int j = 0; j < run.count; ++j, --sx, from -= nodes + 1, to += nodes) {
        T value = from_sum<T>(0.0f);
        if (sx >= 0 && sx < end) value = in[from];
        *to = value;
      }
    });
  }
}
// The transition, from entries that are not adjacent for neighboring targets: a thread owns a target and some
// rows of its window.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 3)
    walk_transition_tiled_kernel(const __grid_constant__ WalkParams p, const __grid_constant__ WalkTiles s) {
  AFA_DYNAMIC_SHARED(float, entries);
  __shared__ int first_of_run[kMaxRuns];
  const int64_t nodes = p.height * p.width;
  const int thread = static_cast<int>(threadIdx.x), targets = 4 * s.groups;
  const int strand = thread / targets, target = thread - strand * targets;
  const int width = static_cast<int>(p.width), pitch = s.entry_pitch();
  count_offsets(p.stencil, first_of_run);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    for (int64_t item = blockIdx.x; item < p.height * s.across; item += gridDim.x) {
      const WalkPiece piece = piece_of(p, s, b, item);
      const int x = piece.x + target;
      const bool mine = x < width;
      float* const out =
          static_cast<float*>(p.out) + b * p.stencil.size * nodes + int64_t{piece.y} * width + x;
      // The last source of a run, to the right of the target, as one index of row, column and tile; and the
      // target in its tile.
      const float* const tiles = entries + (target / 4 + 2 * s.reach) * 16 + target % 4;
      ColumnSum<float> sum;
      for (int first = piece.first; first < piece.end; first += s.rows) {
        const int end = first + s.rows < piece.end ? first + s.rows : piece.end;
        __syncthreads();
        with_power(
            p, [&](auto power) { stage_entries<T>(p, s, piece, first, end, first_of_run, entries, power); });
        __syncthreads();
        const int r = first + strand;
        if (r >= end || !mine) continue;
        const float* const row = tiles + strand * s.sources() * pitch;
        const int half = p.stencil.run[r].dx;
        float* entry = out + first_of_run[r] * nodes;
        int source = target + 4 * s.reach + half;
        for (int sx = x + half; sx >= x - half; --sx, --source, entry += nodes) {
          float value = 0;
          if (sx >= 0 && sx < width) value = row[(source >> 2) * (pitch - 16) + (source & 3) * 4];
          sum.add(value);
          *entry = value;
        }
      }
      double total = p.eps;
      if (p.normalize) {
        double* const sums = reinterpret_cast<double*>(entries);
        __syncthreads();
        sums[strand * targets + target] = sum.total();
        __syncthreads();
        for (int i = 0; i < s.rows; ++i) total += sums[i * targets + target];
      }
      if (!mine) continue;
      // Each thread processes the rows it wrote, and those whose sources are outside the grid.
      const Factor factor(p.normalize ? 1 / total : 1);
      for (int r = 0; r < p.stencil.runs; ++r) {
        const bool outside = r < piece.first || r >= piece.end;
        const int whose = outside ? r : r - piece.first;
        if (whose % s.rows != strand || (!outside && !p.normalize)) continue;
        float* entry = out + first_of_run[r] * nodes;
        for (int j = p.stencil.run[r].count; j > 0; --j, entry += nodes) {
          *entry = outside ? 0 : factor.times(*entry);
        }
      }
    }
  }
}
dim3 node_grid(const WalkParams& p) {
  return grid_for(p.height * p.width, p.batch);
}

}  // namespace

const char* launch_walk_transition(const WalkParams& p, void* stream) {
  WalkTiles s;
  if (p.layout != Layout::by_offset && find_tiles(p, 4, 0, kTileThreads, s)) {
    with_type(p.kind, [&](auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) < sizeof(double)) {
        AFA_LAUNCH_SHARED((walk_transition_tiled_kernel<T>), tile_grid(p, s), s.threads(),
                          s.shared() * sizeof(float), stream, p, s);
      }
    });
    return launch_error();
  }
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_walk_transition_backward(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_backward_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}
const char* launch_walk_transpose(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transpose_kernel<decltype(type)>),
               grid_for(p.height * p.width, p.batch * p.stencil.runs), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
