// The walk's transition on CUDA. transition and its backward: a thread owns one target node, reads the
// entries of its window twice (the sum first; the second time from cache) and writes K coalesced weights.
// Neighbouring targets read neighbouring entries of neighbouring sources, so a source's line serves a warp as
// the offsets pass. transpose: a thread owns one entry. step: a thread owns one target node of up to eight
// classes, and reads the entries of its window once for their sum and for the scores. Nothing outside the
// window is read.
#include "common/cuda.cuh"
#include "walk/walk.h"

namespace afa {
namespace {

__device__ inline float power_of(float value, double power) {
  return powf(value, static_cast<float>(power));
}
__device__ inline double power_of(double value, double power) {
  return pow(value, power);
}

template <typename Sum>
__device__ Sum raised(const WalkParams& p, Sum value) {
  return p.whole_power > 0 ? whole_power(value, p.whole_power) : power_of(value, p.power);
}

template <typename Sum>
__device__ Sum raised_derivative(const WalkParams& p, Sum value) {
  const Sum outer = static_cast<Sum>(p.power);
  return p.whole_power > 0 ? outer * whole_power(value, p.whole_power - 1)
                           : outer * power_of(value, p.power - 1);
}

// f(k, index of the source) for every offset of the window; the index is -1 outside the grid.
template <typename F>
__device__ void each_source(const WalkParams& p, int64_t y, int64_t x, const F& f) {
  int64_t k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run run = p.stencil.run[r];
    const int64_t sy = y + run.dy;
    for (int j = 0; j < run.count; ++j, ++k) {
      const int64_t sx = x + run.dx + int64_t{j} * run.step;
      const bool inside = sy >= 0 && sy < p.height && sx >= 0 && sx < p.width;
      f(k, inside ? sy * p.width + sx : int64_t{-1});
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) walk_transition_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    Sum* out = static_cast<Sum*>(p.out) + b * p.stencil.size * nodes;
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / p.width, x = node - y * p.width;
      auto entry = [&](int64_t source, int64_t k) {
        return raised(p, to_sum<Sum>(affinity[affinity_index(p, b, source, node, k)]));
      };
      // In double: an error that a column shares would grow with every step of a long walk.
      double factor = 1;
      if (p.normalize) {
        double sum = p.eps;
        each_source(p, y, x, [&](int64_t k, int64_t source) {
          if (source >= 0) sum += entry(source, k);
        });
        factor = 1 / sum;
      }
      each_source(p, y, x, [&](int64_t k, int64_t source) {
        out[k * nodes + node] = source >= 0 ? static_cast<Sum>(entry(source, k) * factor) : Sum{0};
      });
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    walk_transition_backward_kernel(const __grid_constant__ WalkParams p) {
  using Sum = typename SumOf<T>::type;
  const T* affinity = static_cast<const T*>(p.affinity);
  T* out = static_cast<T*>(p.out);
  const int64_t nodes = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const Sum* grad = static_cast<const Sum*>(p.in) + b * p.stencil.size * nodes;
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / p.width, x = node - y * p.width;
      Sum sum = 1, dot = 0;
      if (p.normalize) {
        sum = static_cast<Sum>(p.eps);
        each_source(p, y, x, [&](int64_t k, int64_t source) {
          if (source < 0) return;
          const Sum value = raised(p, to_sum<Sum>(affinity[affinity_index(p, b, source, node, k)]));
          sum += value;
          dot += grad[k * nodes + node] * value;
        });
        dot /= sum;
      }
      each_source(p, y, x, [&](int64_t k, int64_t source) {
        if (source < 0) return;
        const int64_t at = affinity_index(p, b, source, node, k);
        const Sum slope = raised_derivative(p, to_sum<Sum>(affinity[at]));
        out[gradient_index(p, b, source, node, k)] =
            from_sum<T>((grad[k * nodes + node] - dot) / sum * slope);
      });
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(6))
    walk_transpose_kernel(const __grid_constant__ WalkParams p) {
  const int64_t nodes = p.height * p.width;
  for (int64_t index = blockIdx.y; index < p.batch; index += gridDim.y) {
    const T* in = static_cast<const T*>(p.in) + index * p.stencil.size * nodes;
    T* out = static_cast<T*>(p.out) + index * p.stencil.size * nodes;
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / p.width, x = node - y * p.width;
      each_source(p, y, x, [&](int64_t k, int64_t source) {
        const T nothing = from_sum<T>(0.0f);
        out[k * nodes + node] = source >= 0 ? in[(p.stencil.size - 1 - k) * nodes + source] : nothing;
      });
    }
  }
}

constexpr int kStepClasses = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(6))
    walk_step_kernel(const __grid_constant__ WalkStepParams p) {
  using Sum = typename SumOf<T>::type;
  const WalkParams& walk = p.walk;
  const T* affinity = static_cast<const T*>(walk.affinity);
  const int64_t nodes = walk.height * walk.width;
  const int64_t groups = (p.classes + kStepClasses - 1) / kStepClasses;
  for (int64_t index = blockIdx.y; index < walk.batch * groups; index += gridDim.y) {
    const int64_t b = index / groups, first = index % groups * kStepClasses;
    const int64_t plane = b * p.classes + first;
    const int64_t count = p.classes - first < kStepClasses ? p.classes - first : kStepClasses;
    const Sum* scores = static_cast<const Sum*>(p.scores) + plane * nodes;
    Sum* out = static_cast<Sum*>(p.out) + plane * nodes;
    bool on[kStepClasses];
    for (int c = 0; c < kStepClasses; ++c) {
      on[c] = c < count && (p.class_mask == nullptr || p.class_mask[plane + c]);
    }
    for (int64_t node = first_item(); node < nodes; node += item_stride()) {
      const int64_t y = node / walk.width, x = node - y * walk.width;
      Sum total = static_cast<Sum>(walk.eps);
      Sum sum[kStepClasses] = {};
      each_source(walk, y, x, [&](int64_t k, int64_t source) {
        if (source < 0) return;
        const Sum value = raised(walk, to_sum<Sum>(affinity[affinity_index(walk, b, source, node, k)]));
        total += value;
#pragma unroll
        for (int c = 0; c < kStepClasses; ++c) {
          if (on[c]) sum[c] += value * scores[c * nodes + source];
        }
      });
      const Sum factor = walk.normalize ? 1 / total : Sum{1};
#pragma unroll
      for (int c = 0; c < kStepClasses; ++c) {
        if (c < count) out[c * nodes + node] = on[c] ? sum[c] * factor : Sum{0};
      }
    }
  }
}

dim3 node_grid(const WalkParams& p) {
  return grid_for(p.height * p.width, p.batch);
}

}  // namespace

const char* walk_transition_cuda(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* walk_transition_backward_cuda(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transition_backward_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* walk_step_cuda(const WalkStepParams& p, void* stream) {
  const int64_t groups = ceil_div(p.classes, kStepClasses);
  with_type(p.walk.kind, [&](auto type) {
    AFA_LAUNCH((walk_step_kernel<decltype(type)>),
               grid_for(p.walk.height * p.walk.width, p.walk.batch * groups), kThreads, stream, p);
  });
  return launch_error();
}

const char* walk_transpose_cuda(const WalkParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((walk_transpose_kernel<decltype(type)>), node_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
