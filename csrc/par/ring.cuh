// The stencil of PAR's default dilations as compile-time constants: the values that a thread reads for the
// pixels it owns, each once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace afa {
namespace {

constexpr int kRingDilations[] = {1, 2, 4, 8, 12, 24};
constexpr int kRingSize = 48;
constexpr int kRingReach = 24;
constexpr int kStackStep =
    4;  // rows between a thread's pixels: the step for which the pixels have the most values in common

// The neighbor's index in the ring's order, or -1.
constexpr int ring_index(int dy, int dx) {
  if (dy == 0 && dx == 0) return -1;
  for (int i = 0; i < 6; ++i) {
    const int d = kRingDilations[i];
    if ((dy == 0 || dy == d || dy == -d) && (dx == 0 || dx == d || dx == -d)) {
      const int at = (dy / d + 1) * 3 + dx / d + 1;  // 0 to 8, 4 the center
      return 8 * i + (at > 4 ? at - 1 : at);
    }
  }
  return -1;
}

// All values that STACK pixels, kStackStep rows apart, read, in row-major order. So a pixel's products are
// added in the order of its neighbors' rows and columns for any STACK.
template <int STACK>
struct RingValues {
  static constexpr int kLastRow = kRingReach + kStackStep * (STACK - 1);
  static constexpr bool is_read(int row, int column) {
    for (int i = 0; i < STACK; ++i) {
      if (ring_index(row - kStackStep * i, column) >= 0) return true;
    }
    return false;
  }
  static constexpr int count() {
    int n = 0;
    for (int row = -kRingReach; row <= kLastRow; ++row) {
      for (int column = -kRingReach; column <= kRingReach; ++column) n += is_read(row, column) ? 1 : 0;
    }
    return n;
  }
  struct Table {
    int16_t row[count()];
    int16_t column[count()];
    int16_t neighbor[count()][STACK];  // by which neighbor pixel i reads it, or -1
  };
  static constexpr Table make() {
    Table table{};
    int n = 0;
    for (int row = -kRingReach; row <= kLastRow; ++row) {
      for (int column = -kRingReach; column <= kRingReach; ++column) {
        if (!is_read(row, column)) continue;
        table.row[n] = static_cast<int16_t>(row);
        table.column[n] = static_cast<int16_t>(column);
        for (int i = 0; i < STACK; ++i) {
          table.neighbor[n][i] = static_cast<int16_t>(ring_index(row - kStackStep * i, column));
        }
        ++n;
      }
    }
    return table;
  }
  static constexpr int kCount = count();
};
template <int STACK>
struct RingTable {
  static constexpr typename RingValues<STACK>::Table kValues = RingValues<STACK>::make();
};

}  // namespace
}  // namespace afa
