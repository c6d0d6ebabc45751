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
    const int64_t kept = count > p.most ? 0 : count, extra = p.background_map ? 1 : 0;
    p.count[b] = count > p.most ? -1 : static_cast<int32_t>(count);
    const int64_t maps = (p.most + extra) * p.thresholds;
    for (int64_t i = 0; i < maps; ++i) p.mask[b * maps + i] = kept > 0 && i < (kept + extra) * p.thresholds;
    if (p.extent != nullptr) {
      const Region region = region_of(p.box, b, p.height, p.width, p.downscale);
      p.extent[2 * b] = region.small_height;
      p.extent[2 * b + 1] = region.small_width;
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
    const Region r = region_of(p.box, plane / p.channels, p.rows.from, p.columns.from, p.downscale);
    const Axis rows{r.height, r.small_height}, columns{r.width, r.small_width};
    const In* in = static_cast<const In*>(p.in) + plane * p.in_stride_p + r.y * p.in_stride_y + r.x;
    T* out = static_cast<T*>(p.out) + plane * pixels;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.columns.to, x = pixel - y * p.columns.to;
      if (y >= r.small_height || x >= r.small_width) continue;
      out[pixel] = sample<T>(in, p.in_stride_y, 1, tap<T>(rows, y), tap<T>(columns, x));
    }
  }
}

template <typename In>
__global__ void __launch_bounds__(kThreads, min_blocks<In>(7))
    score_kernel(const __grid_constant__ ScoreParams p) {
  using T = typename SumOf<In>::type;
  const int64_t width = p.columns.to, pixels = p.rows.to * width, most = p.classes.most;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const In* cams = static_cast<const In*>(p.cams) + b * p.cam_stride_b;
    const int32_t* planes = p.classes.plane + b * most;
    T* maps = static_cast<T*>(p.maps) + b * most * p.thresholds * pixels;
    const int64_t count = p.classes.count[b];
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / width, x = pixel - y * width;
      const Tap<T> row = tap<T>(p.rows, y), column = tap<T>(p.columns, x);
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

template <typename In>
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ PlaceParams p) {
  using T = typename SumOf<In>::type;
  const int64_t pixels = p.map_height * p.map_width, grid = p.grid_height * p.grid_width;
  const int64_t most = p.classes.most;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const Region r = region_of(p.box, b, p.height, p.width, p.downscale);
    T* maps = static_cast<T*>(p.maps) + b * (most + 1) * p.thresholds * pixels;
    const int64_t count = p.classes.count[b];
    if (count <= 0) continue;
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.map_width, x = pixel - y * p.map_width;
      if (y >= r.small_height || x >= r.small_width) continue;
      const FourTaps<T> rows = place_taps<T>(y, r.height, r.small_height, r.y, p.grid_height, p.height);
      const FourTaps<T> columns = place_taps<T>(x, r.width, r.small_width, r.x, p.grid_width, p.width);
      for (int64_t j = 0; j <= count; ++j) {
        const int64_t plane = b * p.planes + (j == 0 ? 0 : 1 + p.classes.plane[b * most + j - 1]);
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          const In* scores = static_cast<const In*>(p.scores[t]) + plane * grid;
          T sum = 0;
          for (int m = 0; m < 4; ++m) {
            T across = 0;
            for (int n = 0; n < 4; ++n) {
              across += columns.weight[n] * to_sum<T>(scores[rows.at[m] * p.grid_width + columns.at[n]]);
            }
            sum += rows.weight[m] * across;
          }
          maps[(j * p.thresholds + t) * pixels + pixel] = sum;
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) choice_kernel(const __grid_constant__ ChoiceParams p) {
  const int64_t pixels = p.height * p.width, map_pixels = p.map_height * p.map_width;
  const int64_t most = p.classes.most, extra = p.background_map ? 1 : 0;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* maps = static_cast<const T*>(p.maps) + b * (most + extra) * p.thresholds * map_pixels;
    const int32_t* numbers = p.classes.number + b * most;
    const int64_t* box = p.box == nullptr ? nullptr : p.box + 4 * b;
    const int64_t count = p.classes.count[b];
    Axis rows = p.rows, columns = p.columns;
    int64_t first_y = 0, first_x = 0;
    if (p.regional) {
      const Region r = region_of(p.box, b, p.height, p.width, p.downscale);
      rows = {r.small_height, r.height};
      columns = {r.small_width, r.width};
      first_y = r.y;
      first_x = r.x;
    }
    for (int64_t pixel = first_item(); pixel < pixels; pixel += item_stride()) {
      const int64_t y = pixel / p.width, x = pixel - y * p.width;
      const bool inside = box == nullptr || (y >= box[0] && y < box[1] && x >= box[2] && x < box[3]);
      int32_t label = inside && count >= 0 ? 0 : p.ignore;
      if (inside && count > 0) {
        const Tap<T> row = tap<T>(rows, y - first_y), column = tap<T>(columns, x - first_x);
        auto value = [&](int64_t map) {
          return sample<T>(maps + map * map_pixels, p.map_width, 1, row, column);
        };
        int32_t choice[kMaxThresholds] = {};  // for each threshold: 0, or the class's label
#pragma unroll
        for (int t = 0; t < kMaxThresholds; ++t) {
          if (t >= p.thresholds) break;
          T best = 0, background = p.background_map ? value(t) : static_cast<T>(p.total);
          for (int64_t j = 0; j < count; ++j) {
            const T score = value((j + extra) * p.thresholds + t);
            if (j == 0 || score > best) {
              best = score;
              choice[t] = numbers[j];
            }
            if (!p.background_map) background -= score;
          }
          if (!(best > background)) choice[t] = 0;
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

const char* label_scores_cuda(const ScoreParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((score_kernel<decltype(type)>), grid_for(p.rows.to * p.columns.to, p.batch), kThreads, stream,
               p);
  });
  return launch_error();
}

const char* label_place_cuda(const PlaceParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((place_kernel<decltype(type)>), grid_for(p.map_height * p.map_width, p.batch), kThreads,
               stream, p);
  });
  return launch_error();
}

const char* label_choices_cuda(const ChoiceParams& p, void* stream) {
  const dim3 grid = grid_for(p.height * p.width, p.batch);
  if (p.kind == Kind::f64) {
    AFA_LAUNCH((choice_kernel<double>), grid, kThreads, stream, p);
  } else {
    AFA_LAUNCH((choice_kernel<float>), grid, kThreads, stream, p);
  }
  return launch_error();
}

}  // namespace afa
