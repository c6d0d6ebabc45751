// Windowed affinities of neighboring nodes: from a boundary map (IRN) and from features (PSA).
//
// Planes by offset: A[b, k, y, x] is the affinity of node (y, x) and node (y, x) + offset k of the window; 0
// if that is outside the grid. A is symmetric: A[k] at a node equals A[K - 1 - k] at its k-th neighbor, so
// only the half of the window after its center is computed.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

struct PairAffinityParams {
  Stencil stencil;        // the window's offsets with inverted signs, in the order of the window
  Kind kind = Kind::f32;  // of all tensors
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  const void* in = nullptr;        // [B, h, w] boundary map, or [B, C, h, w] features; contiguous
  const void* affinity = nullptr;  // backward: [B, K, h, w], the result of the forward pass
  const void* grad = nullptr;      // backward: [B, K, h, w]
  void* out = nullptr;             // [B, K, h, w]; backward: [B, C, h, w]
};

namespace {

// f(y, x) for the grid points on the path from (0, 0) to (dy, dx), dy >= 0: those in the bounding box of the
// segment whose distance from its line is less than 1. They are adjacent in each row, and the first point
// tested is always one of them.
template <typename F>
AFA_HOST_DEVICE inline void each_path_point(int64_t dy, int64_t dx, const F& f) {
  const int64_t length = dy * dy + dx * dx;  // squared, as are the distances times the length
  const int64_t low = dx < 0 ? dx : 0, high = dx > 0 ? dx : 0;
  auto near = [&](int64_t y, int64_t x) {
    const int64_t cross = dy * x - dx * y;
    return x >= low && x <= high && cross * cross < length;
  };
  for (int64_t y = 0; y <= dy; ++y) {
    int64_t x = dy == 0 ? 0 : dx * y / dy;
    while (near(y, x - 1)) --x;
    for (; near(y, x); ++x) f(y, x);
  }
}

}  // namespace

// Rows `begin` to `end` of the batch's B * h rows; float32 and float64. A row also writes its mirrored
// entries in later rows. `scratch` has K * (w + kFactorSlack) values.
constexpr int64_t kFactorSlack = 16;
AFA_SIMD_DECLARE(void edge_affinity_rows(const PairAffinityParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void feature_affinity_rows(const PairAffinityParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void feature_affinity_backward_rows(const PairAffinityParams& p, int64_t begin, int64_t end,
                                                     void* scratch))

const char* launch_edge_affinity(const PairAffinityParams& p, void* stream);
const char* launch_feature_affinity(const PairAffinityParams& p, void* stream);
const char* launch_feature_affinity_backward(const PairAffinityParams& p, void* stream);

}  // namespace afa
