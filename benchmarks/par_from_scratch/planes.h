// Planes with replicated columns on both sides of every row, so that no loop clamps a column. Versions 5 to 7
// store one plane after the other; versions 8 and 9 store row y of all planes together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "par.h"

struct Planes {
  int64_t count, height, width;
  int64_t plane_stride, row_stride;  // in elements
  int64_t left;                      // columns before x = 0
  std::vector<float> data;

  float* row(int64_t plane, int64_t y) { return data.data() + plane * plane_stride + y * row_stride + left; }

  void replicate_border(int64_t plane, int64_t y) {
    float* first = row(plane, y);
    std::fill(first - kReach, first, first[0]);
    std::fill(first + width, first + width + kReach, first[width - 1]);
  }

  // From and to contiguous [count, height, width].
  void read(const float* source) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t y = 0; y < height; ++y, source += width) {
        std::copy_n(source, width, row(c, y));
        replicate_border(c, y);
      }
    }
  }

  void write(float* target) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t y = 0; y < height; ++y, target += width) std::copy_n(row(c, y), width, target);
    }
  }
};

inline Planes planes_in_order(int64_t count, int64_t height, int64_t width) {
  const int64_t row = width + 2 * kReach;
  return {count, height, width, height * row, row, kReach, std::vector<float>(count * height * row)};
}

// x = 0 is 128 bytes after the start of a row, whose length is an odd number of cache lines.
inline Planes planes_by_row(int64_t count, int64_t height, int64_t width) {
  constexpr int64_t kLine = 16, kLeft = 32;
  const int64_t row = ((kLeft + width + kReach + kLine - 1) / kLine | 1) * kLine;
  return {count, height, width, row, count * row, kLeft, std::vector<float>(count * height * row)};
}
