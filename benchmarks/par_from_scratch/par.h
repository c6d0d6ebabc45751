// Shared by the C++ versions: the interface, the neighbors, the position term, and the affinity of
// versions 4 to 6.
//
// Each version exports two C functions for one image. Tensors are contiguous float32: image [channels, H, W],
// weights [48, H, W], masks and out [classes, H, W]. W is at least 16. Versions before 9 use one thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

extern "C" {
void par_affinity(const float* image, float* weights, int64_t channels, int64_t height, int64_t width,
                  int64_t threads);
void par_propagate(const float* weights, const float* masks, float* out, int64_t classes, int64_t height,
                   int64_t width, int64_t iterations, int64_t threads);
}

constexpr int kNeighbors = 48;
constexpr int64_t kReach = 24;
constexpr float kW1 = 0.3f, kW2 = 0.01f;

inline int64_t clamp(int64_t index, int64_t size) {
  return std::clamp<int64_t>(index, 0, size - 1);
}

struct Ring {
  int64_t dy[kNeighbors], dx[kNeighbors];
  float position[kNeighbors];  // w2 * softmax of the position logits

  Ring() {
    int k = 0;
    for (int64_t d : {1, 2, 4, 8, 12, 24}) {
      for (int64_t y = -1; y <= 1; ++y) {
        for (int64_t x = -1; x <= 1; ++x) {
          if (y == 0 && x == 0) continue;
          dy[k] = d * y;
          dx[k++] = d * x;
        }
      }
    }
    double value[kNeighbors], mean = 0, squares = 0, sum = 0;
    for (k = 0; k < kNeighbors; ++k) {
      value[k] = std::hypot(static_cast<double>(dy[k]), static_cast<double>(dx[k]));
      mean += value[k] / kNeighbors;
    }
    for (k = 0; k < kNeighbors; ++k) squares += (value[k] - mean) * (value[k] - mean);
    const double scale = (std::sqrt(squares / (kNeighbors - 1)) + 1e-8) * kW1;
    for (k = 0; k < kNeighbors; ++k) {
      value[k] = std::exp(-(value[k] / scale) * (value[k] / scale));
      sum += value[k];
    }
    for (k = 0; k < kNeighbors; ++k) position[k] = static_cast<float>(kW2 * value[k] / sum);
  }
};

// The weights in the order of the equation, one pixel at a time.
inline void pixel_affinity(const float* image, float* weights, int64_t channels, int64_t height,
                           int64_t width) {
  const Ring ring;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      float logit[kNeighbors] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const float* plane = image + c * height * width;
        float value[kNeighbors], mean = 0, squares = 0;
        for (int k = 0; k < kNeighbors; ++k) {
          value[k] = plane[clamp(y + ring.dy[k], height) * width + clamp(x + ring.dx[k], width)];
          mean += value[k] / kNeighbors;
        }
        for (int k = 0; k < kNeighbors; ++k) squares += (value[k] - mean) * (value[k] - mean);
        const float sigma = std::sqrt(squares / (kNeighbors - 1));
        for (int k = 0; k < kNeighbors; ++k) {
          const float distance = (value[k] - plane[y * width + x]) / ((sigma + 1e-8f) * kW1);
          logit[k] -= distance * distance / static_cast<float>(channels);
        }
      }
      const float top = *std::max_element(logit, logit + kNeighbors);
      float sum = 0;
      for (int k = 0; k < kNeighbors; ++k) {
        logit[k] = std::exp(logit[k] - top);
        sum += logit[k];
      }
      for (int k = 0; k < kNeighbors; ++k) {
        weights[(k * height + y) * width + x] = logit[k] / sum + ring.position[k];
      }
    }
  }
}
