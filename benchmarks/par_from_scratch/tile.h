// The inner loops of versions 6 to 9: sums of a tile of pixels and classes, which stay in registers.
#pragma once

#include <cstdint>

#include "par.h"

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;  // 32 registers: 24 sums, 4 weights
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;  // 16 registers: 12 sums, 2 weights
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kClasses = 6;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vector v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Pointers to the first pixel of a tile. Strides and offsets in elements.
struct Tile {
  const float* weights;
  int64_t weight_stride;
  const float* source;    // row 0 of the first class
  const int64_t* offset;  // of the neighbors in `source`
  int64_t source_stride;  // between classes
  float* target;
  int64_t target_stride;
};

template <int CLASSES, int VECTORS>
void sum_tile(const Tile& t) {
  Vector sum[CLASSES][VECTORS] = {};
  for (int k = 0; k < kNeighbors; ++k) {
    const float* source = t.source + t.offset[k];
    Vector weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weight[v] = load(t.weights + k * t.weight_stride + v * kLanes);
    for (int c = 0; c < CLASSES; ++c) {
      for (int v = 0; v < VECTORS; ++v) {
        sum[c][v] += weight[v] * load(source + c * t.source_stride + v * kLanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < CLASSES; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(t.target + c * t.target_stride + v * kLanes, sum[c][v]);
  }
}

// One row of `classes` (at most CLASSES) from x = 0. The last vector overlaps the one before it if the width
// is not a multiple of the vector length.
template <int CLASSES = kClasses>
void sum_row(const Tile& row, int64_t classes, int64_t width) {
  if constexpr (CLASSES > 1) {
    if (classes < CLASSES) return sum_row<CLASSES - 1>(row, classes, width);
  }
  auto at = [&](int64_t x) {
    Tile t = row;
    t.weights += x;
    t.source += x;
    t.target += x;
    return t;
  };
  int64_t x = 0;
  for (; x + kVectors * kLanes <= width; x += kVectors * kLanes) sum_tile<CLASSES, kVectors>(at(x));
  for (; x < width; x += kLanes) sum_tile<CLASSES, 1>(at(std::min(x, width - kLanes)));
}
