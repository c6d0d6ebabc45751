// The stencil on CUDA: step, adjoint and the gradient of the weights. All three gather, so that no atomics
// are needed and results are the same every time.
//
// step: a thread owns one pixel of up to four classes; a weight is read once, coalesced, for the four, whose
// neighbours come from L1/L2 as vectors of 32 pixels. Reads K weights a pixel for every four classes and K
// values a pixel and class. adjoint: the same, over the pixels that read this one (one a neighbour, more
// along the borders). weight gradient: a thread owns one pixel and one neighbour, and sums over the classes.
#include "common/cuda.cuh"
#include "stencil/stencil.h"

namespace afa {
namespace {

constexpr int kClassBlock = 4;

struct Group {
  int64_t b, first, count;  // image, first class, classes
  bool on[kClassBlock];
  bool any;
};

__device__ Group group_of(const StencilParams& p, int64_t index) {
  const int64_t groups = (p.classes + kClassBlock - 1) / kClassBlock;
  Group g;
  g.b = index / groups;
  g.first = index % groups * kClassBlock;
  g.count = p.classes - g.first < kClassBlock ? p.classes - g.first : kClassBlock;
  g.any = false;
  for (int c = 0; c < kClassBlock; ++c) {
    g.on[c] = c < g.count && (p.class_mask == nullptr || p.class_mask[g.b * p.classes + g.first + c]);
    g.any = g.any || g.on[c];
  }
  return g;
}

template <typename T>
__device__ T* plane_of(const Planes& planes, const StencilParams& p, const Group& g, int c) {
  return static_cast<T*>(planes.data) + (g.b * p.classes + g.first + c) * planes.plane_stride;
}

template <typename T, bool ADJOINT>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(ADJOINT ? 7 : 8))
    stencil_kernel(const __grid_constant__ StencilParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t pixels = p.height * p.width;
  const int64_t groups = p.batch * ((p.classes + kClassBlock - 1) / kClassBlock);
  for (int64_t index = blockIdx.y; index < groups; index += gridDim.y) {
    const Group g = group_of(p, index);
    const int64_t height = ADJOINT || p.extent == nullptr ? p.height : p.extent[2 * g.b];
    const int64_t width = ADJOINT || p.extent == nullptr ? p.width : p.extent[2 * g.b + 1];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.width, x = pixel - y * p.width;
      if (!ADJOINT && (y >= height || x >= width)) continue;
      Sum sum[kClassBlock] = {};
      if (g.any) {
        const T* weights = static_cast<const T*>(p.weights) + g.b * p.weight_stride_b;
        for (int r = 0; r < p.stencil.runs; ++r) {
          const Run run = p.stencil.run[r];
          // Where the weight lies and where the value: the same row and column, swapped in the adjoint.
          const int64_t source_y = clamp_index(y + run.dy, height);
          const Range ys = ADJOINT ? clamp_preimage(y, run.dy, height) : Range{y, y + 1};
          for (int j = 0; j < run.count; ++j, weights += p.weight_stride_k) {
            const int64_t dx = run.dx + int64_t{j} * run.step;
            const int64_t source_x = clamp_index(x + dx, width);
            const Range xs = ADJOINT ? clamp_preimage(x, dx, width) : Range{x, x + 1};
            for (int64_t wy = ys.begin; wy < ys.end; ++wy) {
              for (int64_t wx = xs.begin; wx < xs.end; ++wx) {
                const Sum weight = to_sum<Sum>(weights[wy * p.weight_stride_y + wx]);
                const int64_t at =
                    ADJOINT ? wy * p.in.row_stride + wx : source_y * p.in.row_stride + source_x;
#pragma unroll
                for (int c = 0; c < kClassBlock; ++c) {
                  if (g.on[c]) sum[c] += weight * to_sum<Sum>(plane_of<T>(p.in, p, g, c)[at]);
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kClassBlock; ++c) {
        if (c < g.count) plane_of<T>(p.out, p, g, c)[y * p.out.row_stride + x] = from_sum<T>(sum[c]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(const __grid_constant__ StencilParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t pixels = p.height * p.width;
  for (int64_t index = blockIdx.y; index < p.batch * p.stencil.size; index += gridDim.y) {
    const int64_t b = index / p.stencil.size, k = index % p.stencil.size;
    int64_t first = 0;
    int r = 0;
    while (first + p.stencil.run[r].count <= k) first += p.stencil.run[r++].count;
    const Run run = p.stencil.run[r];
    const int64_t dx = run.dx + (k - first) * run.step;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.width, x = pixel - y * p.width;
      const int64_t source =
          clamp_index(y + run.dy, p.height) * p.in.row_stride + clamp_index(x + dx, p.width);
      Sum sum = 0;
      for (int64_t c = 0; c < p.classes; ++c) {
        const int64_t plane = b * p.classes + c;
        if (p.class_mask != nullptr && !p.class_mask[plane]) continue;
        const T* grad = static_cast<const T*>(p.out.data) + plane * p.out.plane_stride;
        const T* in = static_cast<const T*>(p.in.data) + plane * p.in.plane_stride;
        sum += to_sum<Sum>(grad[y * p.out.row_stride + x]) * to_sum<Sum>(in[source]);
      }
      static_cast<Sum*>(p.grad_weights)[index * pixels + pixel] += sum;
    }
  }
}

dim3 group_grid(const StencilParams& p) {
  return grid_for(p.height * p.width, p.batch * ceil_div(p.classes, kClassBlock));
}

}  // namespace

const char* stencil_step_cuda(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    switch (static_cast<StencilStepVariant>(p.variant)) {
      case StencilStepVariant::classes4:
        AFA_LAUNCH((stencil_kernel<decltype(type), false>), group_grid(p), kThreads, stream, p);
        break;
    }
  });
  return launch_error();
}

const char* stencil_adjoint_cuda(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((stencil_kernel<decltype(type), true>), group_grid(p), kThreads, stream, p);
  });
  return launch_error();
}

const char* stencil_weight_grad_cuda(const StencilParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((weight_grad_kernel<decltype(type)>), grid_for(p.height * p.width, p.batch * p.stencil.size),
               kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
