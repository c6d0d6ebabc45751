// Windowed affinities on the CPU; compiled once per SIMD level. A thread owns rows of nodes; the loops run
// along x. Each pair is computed once, by the row of its upper node, and written twice.
//
// Features: four channels at a time are added to a row of sums. Channels are processed in blocks whose rows
// stay in the L1 cache during the loop over offsets. Sums don't depend on the thread that computes a row.
#include "common/vec.h"
#include "pair_affinity/pair_affinity.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int64_t kChannelBlock = 32;

// f(k, dy, dx, first x, end x): the nodes of a row for which x + dx is in the grid (none: end = first).
template <typename F>
inline void each_offset(const PairAffinityParams& p, const F& f) {
  int64_t k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run& run = p.stencil.run[r];
    for (int j = 0; j < run.count; ++j, ++k) {
      const int64_t dx = -(run.dx + int64_t{j} * run.step);
      int64_t first = dx < 0 ? -dx : 0;
      int64_t end = dx > 0 ? p.width - dx : p.width;
      if (first > p.width) first = p.width;
      if (end < first) end = first;
      f(k, -int64_t{run.dy}, dx, first, end);
    }
  }
}

// The same for pairs whose upper (or, in the same row, left) node is in row y: offsets after the window's
// center.
template <typename F>
inline void each_pair(const PairAffinityParams& p, int64_t y, const F& f) {
  each_offset(p, [&](int64_t k, int64_t dy, int64_t dx, int64_t first, int64_t end) {
    if (k > p.stencil.size / 2 && y + dy < p.height) f(k, dy, dx, first, end);
  });
}

// Sets the center to 1 and entries outside the grid to 0.
template <typename T>
inline void fill_border(const PairAffinityParams& p, T* out, int64_t y) {
  each_offset(p, [&](int64_t k, int64_t dy, int64_t, int64_t first, int64_t end) {
    T* row = out + (k * p.height + y) * p.width;
    const bool inside = y + dy >= 0 && y + dy < p.height;
    if (!inside) first = end = p.width;
    if (k == p.stencil.size / 2) {
      for (int64_t x = 0; x < p.width; ++x) row[x] = 1;
      return;
    }
    for (int64_t x = 0; x < first; ++x) row[x] = 0;
    for (int64_t x = end; x < p.width; ++x) row[x] = 0;
  });
}

// Copies affinities [first, end) of row y to the other ends of their pairs.
template <typename T>
inline void mirror(const PairAffinityParams& p, T* out, int64_t k, int64_t y, int64_t dy, int64_t dx,
                   int64_t first, int64_t end) {
  const T* from = out + (k * p.height + y) * p.width;
  T* to = out + ((p.stencil.size - 1 - k) * p.height + y + dy) * p.width + dx;
  for (int64_t x = first; x < end; ++x) to[x] = from[x];
}

template <typename T>
void edge_rows(const PairAffinityParams& p, int64_t begin, int64_t end) {
  const int64_t nodes = p.height * p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    const T* edge = static_cast<const T*>(p.in) + b * nodes + y * p.width;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * nodes;
    fill_border(p, out, y);
    // The rows on paths from row y. Two comparisons per point, which a NaN needs, take 1.6 times as long.
    const int64_t reach = p.stencil.run[0].dy < 0 ? -p.stencil.run[0].dy : p.stencil.run[0].dy;
    const int64_t seen = (y + reach < p.height ? reach + 1 : p.height - y) * p.width;
    int has_nan = 0;
    for (int64_t i = 0; i < seen; ++i) has_nan |= edge[i] != edge[i];
    each_pair(p, y, [&](int64_t k, int64_t dy, int64_t dx, int64_t first, int64_t last) {
      T* top = out + (k * p.height + y) * p.width;
      for (int64_t x = first; x < last; ++x) top[x] = edge[x];
      each_path_point(dy, dx, [&](int64_t py, int64_t px) {
        const T* on_path = edge + py * p.width + px;
        if (has_nan) {
          for (int64_t x = first; x < last; ++x) {
            const bool take = (on_path[x] > top[x]) | (on_path[x] != on_path[x]);  // NaN propagates
            top[x] = take ? on_path[x] : top[x];
          }
          return;
        }
#pragma GCC ivdep
        for (int64_t x = first; x < last; ++x) top[x] = on_path[x] > top[x] ? on_path[x] : top[x];
      });
      for (int64_t x = first; x < last; ++x) top[x] = 1 - top[x];
      mirror(p, out, k, y, dy, dx, first, last);
    });
  }
}

inline float distance(float a, float b) {
  return __builtin_fabsf(a - b);
}
inline double distance(double a, double b) {
  return __builtin_fabs(a - b);
}

template <typename T>
void add_distances(const T* a, const T* b, int64_t stride, int64_t channels, T* sum, int64_t first,
                   int64_t end) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4, a += 4 * stride, b += 4 * stride) {
    const T *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    const T *b1 = b + stride, *b2 = b1 + stride, *b3 = b2 + stride;
#pragma GCC ivdep
    for (int64_t x = first; x < end; ++x) {
      sum[x] +=
          (distance(a[x], b[x]) + distance(a1[x], b1[x])) + (distance(a2[x], b2[x]) + distance(a3[x], b3[x]));
    }
  }
  for (; c < channels; ++c, a += stride, b += stride) {
#pragma GCC ivdep
    for (int64_t x = first; x < end; ++x) sum[x] += distance(a[x], b[x]);
  }
}

// exp(-value / channels), vectorized.
template <typename T>
void exponentials(T* values, int64_t count, T scale) {
  using V = typename Vec<T>::type;
  auto exponential = [&](V v) { return exp_nonpositive(v * -scale); };
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(values + i, exponential(load<T>(values + i)));
  if (i < count) store_first<T>(values + i, exponential(load_first<T>(values + i, count - i)), count - i);
}

template <typename T>
void feature_rows(const PairAffinityParams& p, int64_t begin, int64_t end) {
  const int64_t nodes = p.height * p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    const T* features = static_cast<const T*>(p.in) + b * p.channels * nodes + y * p.width;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * nodes;
    fill_border(p, out, y);
    for (int64_t c = 0; c < p.channels; c += kChannelBlock) {
      const int64_t block = p.channels - c < kChannelBlock ? p.channels - c : kChannelBlock;
      const T* here = features + c * nodes;
      each_pair(p, y, [&](int64_t k, int64_t dy, int64_t dx, int64_t first, int64_t last) {
        T* sum = out + (k * p.height + y) * p.width;
        if (c == 0) {
          for (int64_t x = first; x < last; ++x) sum[x] = 0;
        }
        add_distances(here, here + dy * p.width + dx, nodes, block, sum, first, last);
      });
      // The distance of a node to itself: 0, or NaN.
      T* center = out + (p.stencil.size / 2 * p.height + y) * p.width;
      if (c == 0) {
        for (int64_t x = 0; x < p.width; ++x) center[x] = 0;
      }
      add_distances(here, here, nodes, block, center, 0, p.width);
    }
    T* own = out + (p.stencil.size / 2 * p.height + y) * p.width;
    for (int64_t x = 0; x < p.width; ++x) own[x] += 1;
    each_pair(p, y, [&](int64_t k, int64_t dy, int64_t dx, int64_t first, int64_t last) {
      exponentials<T>(out + (k * p.height + y) * p.width + first, last - first,
                      T{1} / static_cast<T>(p.channels));
      mirror(p, out, k, y, dy, dx, first, last);
    });
  }
}

// dA_k / df = -A_k / C * sign(f - f_k) at each node; a pair's gradient is the sum over both its entries.
// `slope` has the factors of one row of nodes, [K, length], 0 if there is no neighbor: the loop over vectors
// of nodes has no special case at borders, except at the ends of memory. The center's row, which has no
// difference, has the initial values of the sums: 0, or NaN if any factor of the node is NaN or infinite (0
// times it, as in the definition).
template <typename T>
void feature_backward_rows(const PairAffinityParams& p, int64_t begin, int64_t end, T* slope) {
  using V = typename Vec<T>::type;
  const int64_t nodes = p.height * p.width, size = p.batch * p.channels * nodes;
  const int64_t length = (p.width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const T scale = T{-1} / static_cast<T>(p.channels);
  const T* features = static_cast<const T*>(p.in);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    const T* grad = static_cast<const T*>(p.grad) + b * p.stencil.size * nodes;
    const T* affinity = static_cast<const T*>(p.affinity) + b * p.stencil.size * nodes;
    for (int64_t i = 0; i < p.stencil.size * length; ++i) slope[i] = 0;
    each_offset(p, [&](int64_t k, int64_t dy, int64_t dx, int64_t first, int64_t last) {
      if (y + dy < 0 || y + dy >= p.height) return;
      const int64_t here = k * nodes + y * p.width;
      const int64_t there = (p.stencil.size - 1 - k) * nodes + (y + dy) * p.width + dx;
      for (int64_t x = first; x < last; ++x) {
        slope[k * length + x] = (grad[here + x] + grad[there + x]) * affinity[here + x] * scale;
      }
    });
    T* start = slope + p.stencil.size / 2 * length;
    for (int64_t k = 0; k < p.stencil.size; ++k) {
      const T* factor = slope + k * length;
#pragma GCC ivdep
      for (int64_t x = 0; x < length; ++x) start[x] = start[x] * 0 + factor[x] * 0;
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t plane = (b * p.channels + c) * nodes + y * p.width;
      for (int64_t x = 0; x < p.width; x += kLanes<T>) {
        const int64_t count = p.width - x < kLanes<T> ? p.width - x : kLanes<T>;
        const bool whole = count == kLanes<T>;
        const V center = whole ? load<T>(features + plane + x) : load_first<T>(features + plane + x, count);
        V sum = load<T>(start + x);
        const T* weight = slope + x;
        for (int r = 0; r < p.stencil.runs; ++r) {
          const Run& run = p.stencil.run[r];
          const int64_t half = run.dx, dy = -int64_t{run.dy};
          if (y + dy < 0 || y + dy >= p.height) {
            weight += run.count * length;
            continue;
          }
          const int64_t at = plane + x + dy * p.width - half;
          const bool safe = at >= 0 && at + run.count + kLanes<T> <= size;
          for (int64_t j = 0; j < run.count; ++j, weight += length) {
            V other = center;
            if (safe) {
              other = load<T>(features + at + j);
            } else {
              for (int64_t i = 0; i < count; ++i) {
                const int64_t column = x + i - half + j;
                if (column >= 0 && column < p.width) other[i] = features[at + j + i];
              }
            }
            const V factor = load<T>(weight), nothing = {};
            sum += (center > other ? factor : nothing) - (center < other ? factor : nothing);
          }
        }
        T* out = static_cast<T*>(p.out) + plane + x;
        if (whole) {
          store<T>(out, sum);
        } else {
          store_first<T>(out, sum, count);
        }
      }
    }
  }
}

}  // namespace

void edge_affinity_rows(const PairAffinityParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    edge_rows<double>(p, begin, end);
  } else {
    edge_rows<float>(p, begin, end);
  }
}

void feature_affinity_rows(const PairAffinityParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    feature_rows<double>(p, begin, end);
  } else {
    feature_rows<float>(p, begin, end);
  }
}

void feature_affinity_backward_rows(const PairAffinityParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.kind == Kind::f64) {
    feature_backward_rows<double>(p, begin, end, static_cast<double*>(scratch));
  } else {
    feature_backward_rows<float>(p, begin, end, static_cast<float*>(scratch));
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
