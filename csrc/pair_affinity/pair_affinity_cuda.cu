// Windowed affinities on CUDA. A thread owns a node and up to eight of the offsets after the window's center:
// it writes both entries of each pair, and the zeros of both planes at its node. Edges: the points of the
// eight paths are computed once per block, and stored in shared memory as offsets from a node's index.
// Features: a channel is read once for the node and once for each of the eight neighbors. Backward: a thread
// owns eight channels of a node and gathers over the window, so no atomics are needed; the gradient factor of
// a pair is computed once for the eight channels.
#include "common/cuda.cuh"
#include "pair_affinity/pair_affinity.h"

namespace afa {
namespace {

constexpr int kOffsets = 8, kChannels = 8;
// Points of a path: those in the bounding box of the segment at a distance less than 1 from its line, at most
// three per step along the longer side.
constexpr int kMaxPoints = 3 * (kMaxRadius + 1);

struct Offset {
  int dy, dx;
  int64_t step;  // from a node to its neighbor
};

__device__ Offset offset_of(const PairAffinityParams& p, int64_t k) {
  int64_t first = 0;
  int r = 0;
  while (first + p.stencil.run[r].count <= k) first += p.stencil.run[r++].count;
  const Run run = p.stencil.run[r];
  const int dx = -(run.dx + static_cast<int>(k - first) * run.step);
  return {-run.dy, dx, -run.dy * p.width + dx};
}

// The distance from a node to the grid's borders, limited to the reach of a window.
class Room {
 public:
  __device__ Room(const PairAffinityParams& p, int64_t y, int64_t x)
      : up_(within_reach(y)),
        down_(within_reach(p.height - 1 - y)),
        left_(within_reach(x)),
        right_(within_reach(p.width - 1 - x)) {}
  __device__ bool holds(int dy, int dx) const {
    return dy <= down_ && -dy <= up_ && dx <= right_ && -dx <= left_;
  }

 private:
  static __device__ int within_reach(int64_t distance) {
    return distance < kMaxRadius ? static_cast<int>(distance) : kMaxRadius;
  }
  int up_, down_, left_, right_;
};

// f(node, its room)
template <typename F>
__device__ void each_node(const PairAffinityParams& p, const F& f) {
  const int64_t nodes = p.height * p.width;
  for (int64_t node = first_item(); node < nodes; node += item_stride()) {
    const int64_t y = node / p.width;
    f(node, Room(p, y, node - y * p.width));
  }
}

// Writes a node's entry of an offset, at `forth`, and the entry at the pair's other end; `back` is the node's
// entry of the opposite offset, which is 0 if the node is not the other end of any pair.
template <typename T, typename Sum>
__device__ void write_pair(const Room& room, const Offset& offset, T* forth, T* back, Sum value) {
  const bool has_other = room.holds(offset.dy, offset.dx);
  const T entry = from_sum<T>(has_other ? value : Sum{0});
  *forth = entry;
  if (has_other) back[offset.step] = entry;
  if (!room.holds(-offset.dy, -offset.dx)) *back = from_sum<T>(Sum{0});
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(8))
    edge_affinity_kernel(const __grid_constant__ PairAffinityParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ int64_t points[kOffsets][kMaxPoints];
  __shared__ int counts[kOffsets];
  __shared__ Offset offsets[kOffsets];
  const int64_t nodes = p.height * p.width, center = p.stencil.size / 2;
  const int64_t groups = center / kOffsets + 1;
  for (int64_t index = blockIdx.y; index < p.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kOffsets + center;
    const int64_t left = p.stencil.size - first;
    const int count = static_cast<int>(left < kOffsets ? left : kOffsets);
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread < count) {
      const Offset offset = offset_of(p, first + thread);
      int n = 0;
      each_path_point(offset.dy, offset.dx,
                      [&](int64_t y, int64_t x) { points[thread][n++] = y * p.width + x; });
      counts[thread] = n;
      offsets[thread] = offset;
    }
    __syncthreads();
    const T* in = static_cast<const T*>(p.in) + b * nodes;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * nodes;
    each_node(p, [&](int64_t node, const Room& room) {
      const T* const here = in + node;
      T *forth = out + first * nodes + node, *back = out + (p.stencil.size - 1 - first) * nodes + node;
      const Sum own = to_sum<Sum>(*here);
      for (int i = 0; i < count; ++i, forth += nodes, back -= nodes) {
        if (forth == back) {  // the center
          *forth = from_sum<T>(Sum{1});
          continue;
        }
        const Offset offset = offsets[i];
        Sum top = own;
        if (room.holds(offset.dy, offset.dx)) {
#pragma unroll 4
          for (int j = 0; j < counts[i]; ++j) {
            const Sum on_path = to_sum<Sum>(here[points[i][j]]);
            if (on_path > top || on_path != on_path) top = on_path;  // NaN propagates
          }
        }
        write_pair(room, offset, forth, back, 1 - top);
      }
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(4))
    feature_affinity_kernel(const __grid_constant__ PairAffinityParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ Offset offsets[kOffsets];
  const int64_t nodes = p.height * p.width, center = p.stencil.size / 2;
  const int64_t groups = center / kOffsets + 1;
  for (int64_t index = blockIdx.y; index < p.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kOffsets + center;
    const int64_t left = p.stencil.size - first;
    const int count = static_cast<int>(left < kOffsets ? left : kOffsets);
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread < count) offsets[thread] = offset_of(p, first + thread);
    __syncthreads();
    const T* in = static_cast<const T*>(p.in) + b * p.channels * nodes;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * nodes;
    each_node(p, [&](int64_t node, const Room& room) {
      Sum sum[kOffsets] = {};
      int64_t other[kOffsets];  // the node itself if there is none, and at the center
#pragma unroll
      for (int i = 0; i < kOffsets; ++i) {
        other[i] = 0;
        if (i >= count) continue;
        const Offset offset = offsets[i];
        if (room.holds(offset.dy, offset.dx)) other[i] = offset.step;
      }
      const T* here = in + node;
#pragma unroll 2
      for (int64_t c = 0; c < p.channels; ++c, here += nodes) {
        const Sum value = to_sum<Sum>(*here);
#pragma unroll
        for (int i = 0; i < kOffsets; ++i) {
          sum[i] += fabs(value - to_sum<Sum>(here[other[i]]));
        }
      }
      T *forth = out + first * nodes + node, *back = out + (p.stencil.size - 1 - first) * nodes + node;
#pragma unroll
      for (int i = 0; i < kOffsets; ++i, forth += nodes, back -= nodes) {
        if (i >= count) break;
        if (i == 0 && first == center) {
          *forth = from_sum<T>(1 + sum[0]);  // 1, or NaN
        } else {
          write_pair(room, offsets[i], forth, back, exp(-sum[i] / static_cast<Sum>(p.channels)));
        }
      }
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(3))
    feature_affinity_backward_kernel(const __grid_constant__ PairAffinityParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t nodes = p.height * p.width, groups = (p.channels + kChannels - 1) / kChannels;
  for (int64_t index = blockIdx.y; index < p.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kChannels;
    const int64_t pairs = b * p.stencil.size * nodes, planes = (b * p.channels + first) * nodes;
    const int64_t left = p.channels - first;
    const int count = static_cast<int>(left < kChannels ? left : kChannels);
    each_node(p, [&](int64_t node, const Room& room) {
      const T* const here = static_cast<const T*>(p.in) + planes + node;
      Sum value[kChannels], sum[kChannels] = {};
      Sum start = 0;  // NaN where any slope is NaN or infinite: 0 times it, as in the definition
#pragma unroll
      for (int c = 0; c < kChannels; ++c) value[c] = c < count ? to_sum<Sum>(here[c * nodes]) : Sum{0};
      // For offset k: this node's entry, and the opposite entry of node + offset k.
      const T* grad = static_cast<const T*>(p.grad) + pairs + node;
      const T* opposite = grad + (p.stencil.size - 1) * nodes;
      const T* affinity = static_cast<const T*>(p.affinity) + pairs + node;
      for (int r = 0; r < p.stencil.runs; ++r) {
        const Run run = p.stencil.run[r];  // its offsets, with signs inverted back, are from left to right
        int dx = -run.dx;
        int64_t other = -run.dy * p.width + dx;
        for (int j = 0; j < run.count; ++j, ++dx, ++other) {
          if (room.holds(-run.dy, dx)) {
            const Sum slope = (to_sum<Sum>(*grad) + to_sum<Sum>(opposite[other])) * to_sum<Sum>(*affinity);
            start += slope * 0;
            const T* there = here + other;
#pragma unroll
            for (int c = 0; c < kChannels; ++c, there += nodes) {
              if (c >= count) break;
              const Sum difference = value[c] - to_sum<Sum>(*there);
              if (difference > 0) sum[c] -= slope;
              if (difference < 0) sum[c] += slope;
            }
          }
          grad += nodes;
          opposite -= nodes;
          affinity += nodes;
        }
      }
      T* out = static_cast<T*>(p.out) + planes + node;
#pragma unroll
      for (int c = 0; c < kChannels; ++c, out += nodes) {
        if (c < count) *out = from_sum<T>((sum[c] + start) / static_cast<Sum>(p.channels));
      }
    });
  }
}

dim3 pair_grid(const PairAffinityParams& p) {
  return grid_for(p.height * p.width, p.batch * (p.stencil.size / 2 / kOffsets + 1));
}

}  // namespace

const char* launch_edge_affinity(const PairAffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((edge_affinity_kernel<decltype(type)>), pair_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_feature_affinity(const PairAffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((feature_affinity_kernel<decltype(type)>), pair_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_feature_affinity_backward(const PairAffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((feature_affinity_backward_kernel<decltype(type)>),
               grid_for(p.height * p.width, p.batch * ceil_div(p.channels, kChannels)), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
