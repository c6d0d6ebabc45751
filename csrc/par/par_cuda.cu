// PAR's and PAMR's affinity on CUDA: a thread owns one pixel. Four passes over the neighbours, served by L1:
// mean and variance for each channel, the largest logit with the sum of exponentials (rescaled as the largest
// grows), the weights. Logits are formed again in the last pass rather than stored: the only memory written
// is the K weights a pixel, and a half-precision store could not hold a logit.
#include "common/cuda.cuh"
#include "par/par.h"

namespace afa {
namespace {

struct Pixel {
  int64_t y, x, height, width;  // height and width: of its image
};

template <typename F>
__device__ void each_neighbour(const ParAffinityParams& p, const Pixel& at, const F& f) {
  int k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run run = p.stencil.run[r];
    const int64_t row = clamp_index(at.y + run.dy, at.height) * p.image_stride_y;
    for (int j = 0; j < run.count; ++j)
      f(k++, row + clamp_index(at.x + run.dx + int64_t{j} * run.step, at.width));
  }
}

// What a difference in this channel is multiplied by.
template <bool PAMR, typename Sum, typename T>
__device__ Sum inverse_scale(const ParAffinityParams& p, const T* plane, const Pixel& at) {
  Sum mean = 0, squares = 0;
  each_neighbour(p, at, [&](int, int64_t index) { mean += to_sum<Sum>(plane[index]); });
  const Sum centre = PAMR ? to_sum<Sum>(plane[at.y * p.image_stride_y + at.x]) : Sum{0};
  const Sum centres =
      PAMR ? static_cast<Sum>(p.stencil.size / 8) : Sum{0};  // how often sigma counts the centre
  const Sum count = static_cast<Sum>(p.stencil.size) + centres;
  mean = (mean + centres * centre) / count;
  each_neighbour(p, at, [&](int, int64_t index) {
    const Sum deviation = to_sum<Sum>(plane[index]) - mean;
    squares += deviation * deviation;
  });
  squares += centres * (centre - mean) * (centre - mean);
  const Sum sigma = sqrt(squares / (count - 1));
  if (PAMR) return 1 / (static_cast<Sum>(1e-8) + static_cast<Sum>(0.1) * sigma);
  return 1 / ((sigma + static_cast<Sum>(1e-8)) * static_cast<Sum>(p.w1));
}

constexpr int kChannelsKept = 4;  // their scales stay in registers; those of more channels are formed again

template <typename Sum, bool PAMR>
__device__ Sum distance(Sum step) {
  return PAMR ? (step < 0 ? -step : step) : step * step;
}

template <typename T, bool PAMR>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(PAMR ? 6 : 8))
    par_affinity_kernel(const __grid_constant__ ParAffinityParams p) {
  using Sum = typename SumOf<T>::type;
  const int64_t pixels = p.height * p.width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* image = static_cast<const T*>(p.images) + b * p.image_stride_b;
    T* weights = static_cast<T*>(p.weights) + b * p.stencil.size * pixels;
    const int64_t height = p.extent == nullptr ? p.height : p.extent[2 * b];
    const int64_t width = p.extent == nullptr ? p.width : p.extent[2 * b + 1];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.width, x = pixel - y * p.width;
      if (y >= height || x >= width) continue;
      const Pixel here = {y, x, height, width};
      Sum scale[kChannelsKept], centre[kChannelsKept];
#pragma unroll
      for (int c = 0; c < kChannelsKept; ++c) {
        if (c >= p.channels) break;
        const T* plane = image + c * p.image_stride_c;
        scale[c] = inverse_scale<PAMR, Sum>(p, plane, here);
        centre[c] = to_sum<Sum>(plane[y * p.image_stride_y + x]);
      }
      auto logit = [&](int64_t at) {
        Sum total = 0;
#pragma unroll
        for (int c = 0; c < kChannelsKept; ++c) {
          if (c >= p.channels) break;
          const Sum step = (to_sum<Sum>(image[c * p.image_stride_c + at]) - centre[c]) * scale[c];
          total += distance<Sum, PAMR>(step);
        }
        for (int64_t c = kChannelsKept; c < p.channels; ++c) {
          const T* plane = image + c * p.image_stride_c;
          const Sum difference = to_sum<Sum>(plane[at]) - to_sum<Sum>(plane[y * p.image_stride_y + x]);
          const Sum step = difference * inverse_scale<PAMR, Sum>(p, plane, here);
          total += distance<Sum, PAMR>(step);
        }
        return -total / static_cast<Sum>(p.channels);
      };
      Sum top = 0, sum = 0;
      each_neighbour(p, here, [&](int k, int64_t at) {
        const Sum value = logit(at);
        if (k == 0 || value > top) {
          sum = (k == 0 ? 0 : sum * exp(top - value)) + 1;
          top = value;
        } else {
          sum += exp(value - top);
        }
      });
      each_neighbour(p, here, [&](int k, int64_t at) {
        const bool corner = k % 8 == 0 || k % 8 == 2 || k % 8 == 5 || k % 8 == 7;
        const Sum position = static_cast<Sum>(corner ? p.corner[k / 8] : p.edge[k / 8]);
        weights[k * pixels + pixel] = from_sum<T>(exp(logit(at) - top) / sum + position);
      });
    }
  }
}

}  // namespace

const char* par_affinity_cuda(const ParAffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    const dim3 grid = grid_for(p.height * p.width, p.batch);
    if (p.pamr) {
      AFA_LAUNCH((par_affinity_kernel<decltype(type), true>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((par_affinity_kernel<decltype(type), false>), grid, kThreads, stream, p);
    }
  });
  return launch_error();
}

}  // namespace afa
