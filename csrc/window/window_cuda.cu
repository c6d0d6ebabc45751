// Windowed affinities on CUDA. A thread owns one pair, node and offset: it reads the pair's path or channels,
// neighbouring threads neighbouring nodes, and writes the pair's two entries. Offsets before the window's
// centre only write the zeros of their own plane. Backward: a thread owns one node of one channel and gathers
// over the window, so that no atomics are needed.
#include "common/cuda.cuh"
#include "window/window.h"

namespace afa {
namespace {

struct Offset {
  int64_t dy, dx;
};

__device__ Offset offset_of(const Stencil& stencil, int64_t k) {
  int64_t first = 0;
  int r = 0;
  while (first + stencil.run[r].count <= k) first += stencil.run[r++].count;
  const Run run = stencil.run[r];
  return {-int64_t{run.dy}, -(run.dx + (k - first) * run.step)};
}

__device__ bool inside(const WindowParams& p, int64_t y, int64_t x) {
  return y >= 0 && y < p.height && x >= 0 && x < p.width;
}

template <typename T, bool EDGE>
__global__ void __launch_bounds__(kThreads) window_kernel(const __grid_constant__ WindowParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t nodes = p.height * p.width, centre = p.stencil.size / 2;
  for (int64_t index = blockIdx.y; index < p.batch * p.stencil.size; index += gridDim.y) {
    const int64_t b = index / p.stencil.size, k = index % p.stencil.size;
    const Offset offset = offset_of(p.stencil, k);
    const T* in = static_cast<const T*>(p.in) + b * p.channels * nodes;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * nodes;
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / p.width, x = node - y * p.width;
      if (!inside(p, y + offset.dy, x + offset.dx)) {
        out[k * nodes + node] = from_sum<T>(Sum{0});
        continue;
      }
      if (k == centre) out[k * nodes + node] = from_sum<T>(Sum{1});
      if (k <= centre) continue;
      const int64_t other = node + offset.dy * p.width + offset.dx;
      Sum value;
      if (EDGE) {
        Sum top = to_sum<Sum>(in[node]);
        each_path_point(offset.dy, offset.dx, [&](int64_t py, int64_t px) {
          const Sum on_path = to_sum<Sum>(in[node + py * p.width + px]);
          if (on_path > top) top = on_path;
        });
        value = 1 - top;
      } else {
        Sum sum = 0;
        for (int64_t c = 0; c < p.channels; ++c) {
          const Sum difference = to_sum<Sum>(in[c * nodes + node]) - to_sum<Sum>(in[c * nodes + other]);
          sum += difference < 0 ? -difference : difference;
        }
        value = exp(-sum / static_cast<Sum>(p.channels));
      }
      out[k * nodes + node] = from_sum<T>(value);
      out[(p.stencil.size - 1 - k) * nodes + other] = from_sum<T>(value);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    window_feature_backward_kernel(const __grid_constant__ WindowParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t nodes = p.height * p.width;
  for (int64_t index = blockIdx.y; index < p.batch * p.channels; index += gridDim.y) {
    const int64_t pairs = index / p.channels * p.stencil.size * nodes;
    const T* grad = static_cast<const T*>(p.grad) + pairs;
    const T* affinity = static_cast<const T*>(p.affinity) + pairs;
    const T* features = static_cast<const T*>(p.in) + index * nodes;
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / p.width, x = node - y * p.width;
      const Sum value = to_sum<Sum>(features[node]);
      Sum sum = 0;
      int64_t k = 0;
      for (int r = 0; r < p.stencil.runs; ++r) {
        const Run run = p.stencil.run[r];
        for (int j = 0; j < run.count; ++j, ++k) {
          const int64_t dy = -int64_t{run.dy}, dx = -(run.dx + int64_t{j} * run.step);
          if (!inside(p, y + dy, x + dx)) continue;
          const int64_t other = node + dy * p.width + dx;
          const Sum difference = value - to_sum<Sum>(features[other]);
          const Sum both = to_sum<Sum>(grad[k * nodes + node]) +
                           to_sum<Sum>(grad[(p.stencil.size - 1 - k) * nodes + other]);
          const Sum slope = both * to_sum<Sum>(affinity[k * nodes + node]);
          if (difference > 0) sum -= slope;
          if (difference < 0) sum += slope;
        }
      }
      static_cast<T*>(p.out)[index * nodes + node] = from_sum<T>(sum / static_cast<Sum>(p.channels));
    }
  }
}

dim3 pair_grid(const WindowParams& p) {
  return grid_for(p.height * p.width, p.batch * p.stencil.size);
}

}  // namespace

const char* window_edge_cuda(const WindowParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((window_kernel<decltype(type), true>), pair_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* window_feature_cuda(const WindowParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((window_kernel<decltype(type), false>), pair_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* window_feature_backward_cuda(const WindowParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((window_feature_backward_kernel<decltype(type)>),
               grid_for(p.height * p.width, p.batch * p.channels), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
