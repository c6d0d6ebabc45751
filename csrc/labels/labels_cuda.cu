// Pseudo labels on CUDA. Packing: a thread an image, which lists its present classes on the device, so that
// the host need not know them. Shrinking, scores and choices: a thread owns one pixel of the result and
// samples what it needs; a pixel's four samples lie in rows its neighbours read too, which L1 serves. The
// scores read each present CAM once from memory, the choices each small map once, and nothing of the size of
// the enlarged maps is stored.
#include "common/cuda.cuh"
#include "labels/labels.h"

namespace afa {
namespace {

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams p) {
  for (int64_t b = first_item(); b < p.batch; b += item_stride()) {
    int64_t count = 0;
    for (int64_t c = 0; c < p.classes; ++c) {
      if (!p.present[b * p.classes + c]) continue;
      if (count < p.most) {
        const int64_t index = p.class_index == nullptr ? c : p.class_index[b * p.classes + c];
        p.plane[b * p.most + count] = static_cast<int32_t>(c);
        p.number[b * p.most + count] = static_cast<int32_t>(index + 1);
      }
      ++count;
    }
    const int64_t kept = count > p.most ? 0 : count;
    p.count[b] = count > p.most ? -1 : static_cast<int32_t>(count);
    for (int64_t i = 0; i < p.most * p.thresholds; ++i) {
      p.mask[b * p.most * p.thresholds + i] = i < kept * p.thresholds;
    }
  }
}

template <typename T, typename In>
__device__ T value_of(In in) {
  return sizeof(In) == 1 ? to_sum<T>(in) / 255 : to_sum<T>(in);
}

// The bilinear sample of a plane between two rows and two columns.
template <typename T, typename In>
__device__ T sample(const In* plane, int64_t stride_y, int64_t stride_x, const Tap<T>& y, const Tap<T>& x) {
  const In* above = plane + y.left * stride_y;
  const In* below = plane + y.right * stride_y;
  const T left = 1 - x.weight;
  auto between = [&](const In* row) {
    return left * value_of<T>(row[x.left * stride_x]) + x.weight * value_of<T>(row[x.right * stride_x]);
  };
  return (1 - y.weight) * between(above) + y.weight * between(below);
}

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads) shrink_kernel(const __grid_constant__ ShrinkParams p) {
  const int64_t pixels = p.rows.to * p.columns.to;
  for (int64_t plane = blockIdx.y; plane < p.planes; plane += gridDim.y) {
    const In* in = static_cast<const In*>(p.in) + plane * p.rows.from * p.columns.from;
    T* out = static_cast<T*>(p.out) + plane * pixels;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.columns.to, x = pixel - y * p.columns.to;
      out[pixel] = sample<T>(in, p.columns.from, 1, tap<T>(p.rows, y), tap<T>(p.columns, x));
    }
  }
}

template <typename In>
__global__ void __launch_bounds__(kThreads) score_kernel(const __grid_constant__ LabelParams p) {
  using T = typename SumOf<In>::type;
  const int64_t width = p.down_columns.to, pixels = p.down_rows.to * width;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const In* cams = static_cast<const In*>(p.cams) + b * p.cam_stride_b;
    const int32_t* planes = p.plane + b * p.most;
    T* maps = static_cast<T*>(p.maps) + b * p.most * p.thresholds * pixels;
    const int64_t count = p.count[b];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / width, x = pixel - y * width;
      const Tap<T> row = tap<T>(p.down_rows, y), column = tap<T>(p.down_columns, x);
      auto score = [&](int64_t j) {
        return sample<T>(cams + planes[j] * p.cam_stride_c, p.cam_stride_y, p.cam_stride_x, row, column);
      };
      T top = 0, sum = 0;  // of the classes: the largest score, and the sum of exponentials relative to it
      for (int64_t j = 0; j < count; ++j) {
        const T value = score(j);
        if (j == 0 || value > top) {
          sum = (j == 0 ? 0 : sum * exp(top - value)) + 1;
          top = value;
        } else {
          sum += exp(value - top);
        }
      }
      T largest[kMaxThresholds], inverse[kMaxThresholds];
#pragma unroll
      for (int t = 0; t < kMaxThresholds; ++t) {
        if (t >= p.thresholds) break;
        const T background = static_cast<T>(p.background[t]);
        largest[t] = top > background ? top : background;
        inverse[t] = 1 / (sum * exp(top - largest[t]) + exp(background - largest[t]));
      }
      for (int64_t j = 0; j < count; ++j) {
        const T value = score(j);
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          maps[(j * p.thresholds + t) * pixels + pixel] = exp(value - largest[t]) * inverse[t];
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) choice_kernel(const __grid_constant__ LabelParams p) {
  const int64_t width = p.up_columns.to, pixels = p.up_rows.to * width;
  const int64_t small_pixels = p.up_rows.from * p.up_columns.from;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* maps = static_cast<const T*>(p.maps) + b * p.most * p.thresholds * small_pixels;
    const int32_t* numbers = p.number + b * p.most;
    const int64_t* box = p.box == nullptr ? nullptr : p.box + 4 * b;
    const int64_t count = p.count[b];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / width, x = pixel - y * width;
      const bool inside = box == nullptr || (y >= box[0] && y < box[1] && x >= box[2] && x < box[3]);
      int32_t label = inside && count >= 0 ? 0 : p.ignore;
      if (inside && count > 0) {
        const Tap<T> row = tap<T>(p.up_rows, y), column = tap<T>(p.up_columns, x);
        int32_t choice[kMaxThresholds] = {};  // against each background score: 0, or the class's label
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          T best = 0, sum = 0;
          for (int64_t j = 0; j < count; ++j) {
            const T value =
                sample<T>(maps + (j * p.thresholds + t) * small_pixels, p.up_columns.from, 1, row, column);
            if (j == 0 || value > best) {
              best = value;
              choice[t] = numbers[j];
            }
            sum += value;
          }
          if (!(best > static_cast<T>(p.total) - sum)) choice[t] = 0;
        }
        label = choice[0];
        if (p.thresholds > 1 && label == 0 && choice[1] != 0) label = p.ignore;
      }
      p.labels[b * pixels + pixel] = label;
    }
  }
}

}  // namespace

const char* label_pack_cuda(const PackParams& p, void* stream) {
  AFA_LAUNCH(pack_kernel, grid_for(p.batch, 1), kThreads, stream, p);
  return launch_error();
}

const char* shrink_cuda(const ShrinkParams& p, void* stream) {
  const dim3 grid = grid_for(p.rows.to * p.columns.to, p.planes);
  if (p.kind == Kind::f64) {
    if (p.bytes) {
      AFA_LAUNCH((shrink_kernel<double, uint8_t>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((shrink_kernel<double, double>), grid, kThreads, stream, p);
    }
  } else if (p.bytes) {
    AFA_LAUNCH((shrink_kernel<float, uint8_t>), grid, kThreads, stream, p);
  } else {
    AFA_LAUNCH((shrink_kernel<float, float>), grid, kThreads, stream, p);
  }
  return launch_error();
}

const char* label_scores_cuda(const LabelParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((score_kernel<decltype(type)>), grid_for(p.down_rows.to * p.down_columns.to, p.batch),
               kThreads, stream, p);
  });
  return launch_error();
}

const char* label_choices_cuda(const LabelParams& p, void* stream) {
  const dim3 grid = grid_for(p.up_rows.to * p.up_columns.to, p.batch);
  if (p.kind == Kind::f64) {
    AFA_LAUNCH((choice_kernel<double>), grid, kThreads, stream, p);
  } else {
    AFA_LAUNCH((choice_kernel<float>), grid, kThreads, stream, p);
  }
  return launch_error();
}

}  // namespace afa
