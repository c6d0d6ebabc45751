// PAR's and PAMR's affinity on CUDA: a thread owns one pixel.
//
// par_rings_kernel, for six dilations and accumulation in float32: a channel's differences from the center
// are read once into registers, and three passes over them compute their mean, the deviations from it (a
// plain sum of squares would lose the small ones that matter), and the logits, also in registers. The image
// is read K times per pixel and channel, from L1, at clamped coordinates; the K weights are written once,
// coalesced.
//
// par_affinity_kernel, for all other cases: four passes over the neighbors: mean and variance of each
// channel, the largest logit with the sum of exponentials (rescaled when the largest changes), and the
// weights, from recomputed logits, which could not be stored in half precision.
#include "common/cuda.cuh"
#include "par/par.h"

namespace afa {
namespace {

struct Pixel {
  int64_t y, x, height, width;  // height and width: of its image
};

template <typename F>
__device__ void each_neighbor(const ParAffinityParams& p, const Pixel& at, const F& f) {
  int k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run run = p.stencil.run[r];
    const int64_t row = clamp_index(at.y + run.dy, at.height) * p.image_stride_y;
    for (int j = 0; j < run.count; ++j)
      f(k++, row + clamp_index(at.x + run.dx + int64_t{j} * run.step, at.width));
  }
}

// The factor of a difference in this channel.
template <bool PAMR, typename Sum, typename T>
__device__ Sum inverse_scale(const ParAffinityParams& p, const T* plane, const Pixel& at) {
  Sum mean = 0, squares = 0;
  each_neighbor(p, at, [&](int, int64_t index) { mean += to_sum<Sum>(plane[index]); });
  const Sum center = PAMR ? to_sum<Sum>(plane[at.y * p.image_stride_y + at.x]) : Sum{0};
  const Sum centers = PAMR ? static_cast<Sum>(p.stencil.size / 8) : Sum{0};  // count of the center in sigma
  const Sum count = static_cast<Sum>(p.stencil.size) + centers;
  mean = (mean + centers * center) / count;
  each_neighbor(p, at, [&](int, int64_t index) {
    const Sum deviation = to_sum<Sum>(plane[index]) - mean;
    squares += deviation * deviation;
  });
  squares += centers * (center - mean) * (center - mean);
  const Sum sigma = sqrt(squares / (count - 1));
  if (PAMR) return 1 / (static_cast<Sum>(1e-8) + static_cast<Sum>(0.1) * sigma);
  return 1 / ((sigma + static_cast<Sum>(1e-8)) * static_cast<Sum>(p.w1));
}

// Read in the accumulation type: GeForce GPUs convert doubles at 1/64 of the rate of float operations.
template <typename Sum>
__device__ Sum position_weight(const ParAffinityParams& p, bool corner, int ring) {
  if constexpr (sizeof(Sum) == sizeof(double)) {
    return corner ? p.corner[ring] : p.edge[ring];
  } else {
    return corner ? p.corner32[ring] : p.edge32[ring];
  }
}

constexpr int kChannelsKept = 4;  // their scales stay in registers; with more channels they are recomputed

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
      Sum scale[kChannelsKept], center[kChannelsKept];
#pragma unroll
      for (int c = 0; c < kChannelsKept; ++c) {
        if (c >= p.channels) break;
        const T* plane = image + c * p.image_stride_c;
        scale[c] = inverse_scale<PAMR, Sum>(p, plane, here);
        center[c] = to_sum<Sum>(plane[y * p.image_stride_y + x]);
      }
      auto logit = [&](int64_t at) {
        Sum total = 0;
#pragma unroll
        for (int c = 0; c < kChannelsKept; ++c) {
          if (c >= p.channels) break;
          const Sum step = (to_sum<Sum>(image[c * p.image_stride_c + at]) - center[c]) * scale[c];
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
      each_neighbor(p, here, [&](int k, int64_t at) {
        const Sum value = logit(at);
        if (k == 0 || value > top) {
          sum = (k == 0 ? 0 : sum * exp(top - value)) + 1;
          top = value;
        } else {
          sum += exp(value - top);
        }
      });
      each_neighbor(p, here, [&](int k, int64_t at) {
        const bool corner = k % 8 == 0 || k % 8 == 2 || k % 8 == 5 || k % 8 == 7;
        const Sum position = position_weight<Sum>(p, corner, k / 8);
        weights[k * pixels + pixel] = from_sum<T>(exp(logit(at) - top) / sum + position);
      });
    }
  }
}

// ---- six dilations, in one pass

constexpr int kRings = 6, kRing = 8;
constexpr int64_t kMaxPlane = int64_t{1} << 29;  // pixels whose indices and bytes fit 32 bits

// The part of ParAffinityParams that the kernel uses, in the form it needs.
struct RingParams {
  const void* images;
  void* weights;
  const int64_t* extent;
  int64_t image_stride_b, image_stride_c;
  int64_t batch;
  int32_t channels, height, width, image_stride_y;
  int32_t dilation[kRings] = {};
  float edge[kRings] = {}, corner[kRings] = {};
  float gain;  // factor of scaled differences for logits to the base 2 and the mean over the channels
  float w1;
};

RingParams ring_params(const ParAffinityParams& p) {
  RingParams q = {
      p.images, p.weights, p.extent, p.image_stride_b,        p.image_stride_c, p.batch, 0, 0, 0, 0, {},
      {},       {},        0,        static_cast<float>(p.w1)};
  q.channels = static_cast<int32_t>(p.channels);
  q.height = static_cast<int32_t>(p.height);
  q.width = static_cast<int32_t>(p.width);
  q.image_stride_y = static_cast<int32_t>(p.image_stride_y);
  for (int i = 0; i < kRings; ++i) {
    q.dilation[i] = p.stencil.run[3 * i + 2].dy;
    q.edge[i] = p.edge32[i];
    q.corner[i] = p.corner32[i];
  }
  const double mean = 1.4426950408889634 / static_cast<double>(p.channels);  // log2(e)
  q.gain = static_cast<float>(p.pamr ? mean : sqrt(mean));
  return q;
}

// 2^x for x <= 0; 0 if the result is below the smallest normal number.
__device__ inline float exp2_of(float power) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
#else
  return exp2f(power);
#endif
}

// Sum of f(k) over the neighbors, with four independent accumulators.
template <typename F>
__device__ inline float sum_over(const F& f) {
  float strand[4] = {};
#pragma unroll
  for (int k = 0; k < kRings * kRing; ++k) strand[k % 4] += f(k);
  return (strand[0] + strand[1]) + (strand[2] + strand[3]);
}

// Prevents the compiler from assuming that the value stays the same.
__device__ inline int again(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The neighbors' offsets in a plane of the image, with replicated borders.
__device__ inline void find_neighbors(const RingParams& p, int y, int x, int height, int width,
                                      uint32_t (&at)[kRings * kRing]) {
  const uint32_t stride = static_cast<uint32_t>(p.image_stride_y);
#pragma unroll
  for (int i = 0; i < kRings; ++i) {
    const int d = p.dilation[i];
    const uint32_t left = x > d ? x - d : 0, right = x + d < width ? x + d : width - 1;
    const uint32_t top = y > d ? y - d : 0, bottom = y + d < height ? y + d : height - 1;
    const uint32_t rows[3] = {top * stride, y * stride, bottom * stride};
    uint32_t* ring = at + kRing * i;
    ring[0] = rows[0] + left, ring[1] = rows[0] + x, ring[2] = rows[0] + right;
    ring[3] = rows[1] + left, ring[4] = rows[1] + right;
    ring[5] = rows[2] + left, ring[6] = rows[2] + x, ring[7] = rows[2] + right;
  }
}

template <typename T, bool PAMR>
__global__ void __launch_bounds__(kThreads, 4) par_rings_kernel(const __grid_constant__ RingParams p) {
  constexpr int kSize = kRings * kRing;
  const uint32_t pixels = static_cast<uint32_t>(p.height) * static_cast<uint32_t>(p.width);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* image = static_cast<const T*>(p.images) + b * p.image_stride_b;
    const int height = p.extent == nullptr ? p.height : static_cast<int>(p.extent[2 * b]);
    const int width = p.extent == nullptr ? p.width : static_cast<int>(p.extent[2 * b + 1]);
    for (int64_t item = first_item(); item < pixels; item += item_stride()) {
      const uint32_t pixel = static_cast<uint32_t>(item);
      const int y = static_cast<int>(pixel / static_cast<uint32_t>(p.width));
      const int x = static_cast<int>(pixel - static_cast<uint32_t>(y) * static_cast<uint32_t>(p.width));
      if (y >= height || x >= width) continue;
      float logit[kSize] = {};  // to the base 2, with inverted signs
      const T* plane = image;
#pragma unroll 1
      for (int c = 0; c < p.channels; ++c, plane += p.image_stride_c) {
        const float center = to_sum<float>(plane[y * p.image_stride_y + x]);
        uint32_t at[kSize];  // recomputed for each channel: keeping them would cost the registers of a block
        find_neighbors(p, again(y), again(x), height, width, at);
        float difference[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) difference[k] = to_sum<float>(plane[at[k]]) - center;
        constexpr float centers = PAMR ? kRings : 0;  // count of the center in sigma
        constexpr float count = kSize + centers;
        const float mean = sum_over([&](int k) { return difference[k]; }) * (1 / count);
        float squares = sum_over([&](int k) {
          const float deviation = difference[k] - mean;
          return deviation * deviation;
        });
        if (PAMR) squares += centers * (mean * mean);
        const float sigma = sqrtf(squares * (1 / (count - 1)));
        const float scale = p.gain / (PAMR ? 1e-8f + 0.1f * sigma : (sigma + 1e-8f) * p.w1);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (PAMR) {
            logit[k] += fabsf(difference[k]) * scale;
          } else {
            const float step = difference[k] * scale;
            logit[k] += step * step;
          }
        }
      }
      float least[4] = {logit[0], logit[1], logit[2], logit[3]};
#pragma unroll
      for (int k = 4; k < kSize; ++k) least[k % 4] = fminf(least[k % 4], logit[k]);
      const float top = fminf(fminf(least[0], least[1]), fminf(least[2], least[3]));
      const float inverse = 1 / sum_over([&](int k) { return logit[k] = exp2_of(top - logit[k]); });
      T* out = static_cast<T*>(p.weights) + b * kSize * pixels + pixel;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const bool corner = k % 8 == 0 || k % 8 == 2 || k % 8 == 5 || k % 8 == 7;
        const float weight = logit[k] * inverse + (corner ? p.corner[k / kRing] : p.edge[k / kRing]);
        out[static_cast<uint64_t>(pixels) * k] = from_sum<T>(weight);
      }
    }
  }
}

}  // namespace

const char* launch_par_affinity(const ParAffinityParams& p, void* stream) {
  const dim3 grid = grid_for(p.height * p.width, p.batch);
  const bool rings = p.stencil.size == kRings * kRing && p.height * p.width <= kMaxPlane;
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (rings) {
        const RingParams q = ring_params(p);
        if (p.pamr) {
          AFA_LAUNCH((par_rings_kernel<T, true>), grid, kThreads, stream, q);
        } else {
          AFA_LAUNCH((par_rings_kernel<T, false>), grid, kThreads, stream, q);
        }
        return;
      }
    }
    if (p.pamr) {
      AFA_LAUNCH((par_affinity_kernel<T, true>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((par_affinity_kernel<T, false>), grid, kThreads, stream, p);
    }
  });
  return launch_error();
}

}  // namespace afa
