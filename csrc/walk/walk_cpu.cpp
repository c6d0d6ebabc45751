// The walk's transition and its single step on the CPU; compiled once per SIMD level. A thread owns rows of
// target nodes: it reads each affinity entry of their windows once (those of one source are adjacent, and
// stay in the L1 cache during the loop over offsets), so the N x N matrix is read only inside the window, and
// threads share nothing.
//
// step: the loop for a vector of targets runs over all sources within reach. The entries of one source are
// adjacent, so they are raised to the power and summed as vectors. They stay in the L1 cache while the
// classes are processed in blocks that fit the registers, with one multiply-add per source and class.
#include <cmath>

#include "common/vec.h"
#include "walk/walk.h"

namespace afa {
namespace AFA_SIMD {
namespace {

inline float power_of(float value, double power) {
  return ::powf(value, static_cast<float>(power));
}
inline double power_of(double value, double power) {
  return ::pow(value, power);
}

// Raises values to the power, vectorized if it is a small integer.
template <typename T>
inline typename Vec<T>::type raised_lanes(const WalkParams& p, typename Vec<T>::type value) {
  if (p.whole_power > 0) return whole_power(value, p.whole_power);
  for (int i = 0; i < kLanes<T>; ++i) value[i] = power_of(value[i], p.power);
  return value;
}

template <typename T>
inline void raise(const WalkParams& p, T* values, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>)
    store<T>(values + i, raised_lanes<T>(p, load<T>(values + i)));
  for (; i < count; ++i) {
    values[i] = p.whole_power > 0 ? whole_power(values[i], p.whole_power) : power_of(values[i], p.power);
  }
}

template <typename T>
inline T raised(const WalkParams& p, T value) {
  return p.whole_power > 0 ? whole_power(value, p.whole_power) : power_of(value, p.power);
}

template <typename T>
inline T raised_derivative(const WalkParams& p, T value) {
  const T outer = static_cast<T>(p.power);
  return p.whole_power > 0 ? outer * whole_power(value, p.whole_power - 1)
                           : outer * power_of(value, p.power - 1);
}

// f(k, source row, dx, first x, end x): the targets of row y whose k-th source is in the grid (none: end =
// first).
template <typename F>
inline void each_neighbor(const WalkParams& p, int64_t y, const F& f) {
  int64_t k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run& run = p.stencil.run[r];
    const int64_t row = y + run.dy;
    const bool inside = row >= 0 && row < p.height;
    for (int j = 0; j < run.count; ++j, ++k) {
      const int64_t dx = run.dx + int64_t{j} * run.step;
      int64_t first = dx < 0 ? -dx : 0;
      int64_t end = dx > 0 ? p.width - dx : p.width;
      if (first > p.width) first = p.width;
      if (!inside || end < first) end = first;
      f(k, row, dx, first, end);
    }
  }
}

// Columns are summed and divided in double: a common error would grow with every step of a long walk.
template <typename T>
void transition_rows(const WalkParams& p, int64_t begin, int64_t end, double* sum) {
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    T* out = static_cast<T*>(p.out) + (b * p.stencil.size * p.height + y) * p.width;
    const int64_t plane = p.height * p.width;
    for (int64_t x = 0; x < p.width; ++x) sum[x] = p.eps;
    each_neighbor(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      T* weights = out + k * plane;
      for (int64_t x = 0; x < first; ++x) weights[x] = 0;
      for (int64_t x = last; x < p.width; ++x) weights[x] = 0;
      const T* from = affinity + affinity_index(p, b, row * p.width + dx, y * p.width, k);
      if (p.layout == Layout::by_offset) {
        for (int64_t x = first; x < last; ++x) weights[x] = from[x];
      } else {
        const int64_t stride = p.layout == Layout::dense ? plane + 1 : p.stencil.size;
        for (int64_t x = first; x < last; ++x) weights[x] = from[x * stride];
      }
      raise(p, weights + first, last - first);
#pragma GCC ivdep
      for (int64_t x = first; x < last; ++x) sum[x] += weights[x];
    });
    if (!p.normalize) continue;
    for (int64_t x = 0; x < p.width; ++x) sum[x] = 1 / sum[x];
    for (int64_t k = 0; k < p.stencil.size; ++k) {
      T* weights = out + k * plane;
#pragma GCC ivdep
      for (int64_t x = 0; x < p.width; ++x) weights[x] = static_cast<T>(weights[x] * sum[x]);
    }
  }
}

// With S the column sum + eps and P = A^power / S:  dA = (dP - sum_k dP P) / S * power * A^(power - 1).
template <typename T>
void transition_backward_rows(const WalkParams& p, int64_t begin, int64_t end, T* sum) {
  const T* affinity = static_cast<const T*>(p.affinity);
  T* out = static_cast<T*>(p.out);
  T* dot = sum + p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    const int64_t plane = p.height * p.width;
    const T* grad = static_cast<const T*>(p.in) + (b * p.stencil.size * p.height + y) * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      sum[x] = p.normalize ? static_cast<T>(p.eps) : T{1};
      dot[x] = 0;
    }
    if (p.normalize) {
      each_neighbor(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
        for (int64_t x = first; x < last; ++x) {
          const T value =
              raised(p, affinity[affinity_index(p, b, row * p.width + x + dx, y * p.width + x, k)]);
          sum[x] += value;
          dot[x] += grad[k * plane + x] * value;
        }
      });
      for (int64_t x = 0; x < p.width; ++x) dot[x] /= sum[x];
    }
    each_neighbor(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      for (int64_t x = first; x < last; ++x) {
        const int64_t at = affinity_index(p, b, row * p.width + x + dx, y * p.width + x, k);
        out[gradient_index(p, b, row * p.width + x + dx, y * p.width + x, k)] =
            (grad[k * plane + x] - dot[x]) / sum[x] * raised_derivative(p, affinity[at]);
      }
    });
  }
}

template <typename T>
void transpose_rows(const WalkParams& p, int64_t begin, int64_t end) {
  const int64_t plane = p.height * p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    const T* in = static_cast<const T*>(p.in) + b * p.stencil.size * plane;
    T* out = static_cast<T*>(p.out) + b * p.stencil.size * plane + y * p.width;
    each_neighbor(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      const T* from = in + (p.stencil.size - 1 - k) * plane + row * p.width + dx;
      T* to = out + k * plane;
      for (int64_t x = 0; x < first; ++x) to[x] = 0;
      for (int64_t x = first; x < last; ++x) to[x] = from[x];
      for (int64_t x = last; x < p.width; ++x) to[x] = 0;
    });
  }
}

// ---- a single step

constexpr int kStepClasses = 12;  // sums in registers

// For the targets x0 to x0 + count - 1 of row y: f(source row, first source, end source, half, run's first k)
// for every row of sources within reach.
template <typename F>
inline void each_source_row(const WalkParams& p, int64_t y, int64_t x0, int64_t count, const F& f) {
  int64_t k = 0;
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run& run = p.stencil.run[r];
    const int64_t row = y + run.dy, half = run.dx;
    if (row >= 0 && row < p.height) {
      const int64_t first = x0 - half > 0 ? x0 - half : 0;
      const int64_t end = x0 + count + half < p.width ? x0 + count + half : p.width;
      f(row, first, end, half, k);
    }
    k += run.count;
  }
}

// The powers of a run's entries from sources first to stop - 1 to the lanes' targets; `entries` points to the
// first source's first lane, `stride` is the distance between sources. They are added to `sum` and stored by
// source. Lanes farther than `half` from the source, or not below `count`, are 0, whatever their memory
// contains. `before` and `after` are the numbers of readable elements on each side of `entries`; `ahead` is
// the offset of the data for the next run.
template <typename T, typename Raise>
inline void run_powers(const T* entries, int64_t stride, int64_t before, int64_t after, int64_t ahead,
                       int64_t first, int64_t stop, int64_t half, int64_t count, const Raise& raise,
                       typename Vec<T>::type& sum, T* powers) {
  using V = typename Vec<T>::type;
  using Ints = typename Vec<T>::ints;
  using Int = decltype(Ints{}[0] + Ints{}[0]);
  Ints lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  V total = sum;
  for (int64_t source = first, at = 0; source < stop; ++source, at += stride, powers += kLanes<T>) {
    const int64_t low = source - half > 0 ? source - half : 0;
    const int64_t high = source + half < count ? source + half : count - 1;
    V value = {};
    if (at >= -before && at + kLanes<T> <= after) {
      const V all = load<T>(entries + at);
      value = (lane >= static_cast<Int>(low)) & (lane <= static_cast<Int>(high)) ? all : value;
    } else {
      for (int64_t i = low; i <= high; ++i) value[i] = entries[at + i];
    }
    __builtin_prefetch(entries + at + ahead);
    value = raise(value);
    total += value;
    store<T>(powers, value);
  }
  sum = total;
}

template <typename T, int CLASSES>
inline void step_classes(const WalkStepParams& p, const T* powers, typename Vec<T>::type scale, int64_t b,
                         int64_t y, int64_t x0, int64_t count, int64_t first_class) {
  using V = typename Vec<T>::type;
  const WalkParams& walk = p.walk;
  const int64_t nodes = walk.height * walk.width;
  const int64_t begin = p.active_begin[b], classes = p.active_begin[b + 1] - begin;
  const T* scores = static_cast<const T*>(p.scores) + begin * nodes + first_class;
  V sum[CLASSES] = {};
  each_source_row(walk, y, x0, count, [&](int64_t row, int64_t first, int64_t end, int64_t, int64_t) {
    const T* score = scores + (row * walk.width + first) * classes;
    for (int64_t x = first; x < end; ++x, score += classes, powers += kLanes<T>) {
      const V value = load<T>(powers);
      for (int c = 0; c < CLASSES; ++c) sum[c] += value * score[c];
    }
  });
  for (int c = 0; c < CLASSES; ++c) {
    T* out = static_cast<T*>(p.out) + p.active[begin + first_class + c] * nodes + y * walk.width + x0;
    if (count < kLanes<T>) {
      store_first<T>(out, sum[c] * scale, count);
    } else {
      store<T>(out, sum[c] * scale);
    }
  }
}

template <typename T>
void step_rows(const WalkStepParams& p, int64_t begin, int64_t end, T* powers) {
  using V = typename Vec<T>::type;
  const WalkParams& walk = p.walk;
  const T* affinity = static_cast<const T*>(walk.affinity);
  const int64_t nodes = walk.height * walk.width;
  const bool dense = walk.layout == Layout::dense;
  const int64_t size = walk.batch * nodes * (dense ? nodes : walk.stencil.size);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / walk.height, y = item % walk.height;
    const int64_t classes = p.active_begin[b + 1] - p.active_begin[b];
    if (classes == 0) continue;
    for (int64_t x = 0; x < walk.width; x += kLanes<T>) {
      // If the row's length is not a multiple of the vector length, its last vector overlaps the previous
      // one.
      const int64_t last = walk.width - kLanes<T>;
      const int64_t x0 = last < 0 ? 0 : x < last ? x : last;
      const int64_t count = last < 0 ? walk.width : kLanes<T>;
      T* power = powers;
      V sum = V{} + static_cast<T>(walk.eps);
      each_source_row(
          walk, y, x0, count, [&](int64_t row, int64_t first, int64_t stop, int64_t half, int64_t k) {
            // Targets are adjacent in a dense row, and so are their offsets in a window. The next row of
            // sources is prefetched meanwhile: the stride of its entries is too large for the hardware
            // prefetcher.
            const int64_t stride = dense ? nodes : walk.stencil.size - 1;
            const int64_t ahead =
                row == 0 ? 0 : (dense ? -walk.width * nodes : 2 * half + 1 - walk.width * walk.stencil.size);
            const int64_t at =
                dense ? affinity_index(walk, b, row * walk.width + first, y * walk.width + x0, 0)
                      : affinity_index(walk, b, row * walk.width + first, 0, k + half + x0 - first);
            auto powers_of_run = [&](auto raise) {
              run_powers<T>(affinity + at, stride, at, size - at, ahead, first - x0, stop - x0, half, count,
                            raise, sum, power);
            };
            if (walk.whole_power == 2) {
              powers_of_run([](V value) { return value * value; });
            } else {
              powers_of_run([&](V value) { return raised_lanes<T>(walk, value); });
            }
            power += (stop - first) * kLanes<T>;
          });
      const V scale = walk.normalize ? 1 / sum : V{} + 1;
      for (int64_t c = 0; c < classes;) {
        // Blocks of nearly equal size.
        const int64_t blocks = (classes - c + kStepClasses - 1) / kStepClasses;
        const int64_t block = (classes - c + blocks - 1) / blocks;
        switch (block) {
#define AFA_STEP_CASE(n)                                      \
  case n:                                                     \
    step_classes<T, n>(p, powers, scale, b, y, x0, count, c); \
    break;
          AFA_STEP_CASE(1)
          AFA_STEP_CASE(2)
          AFA_STEP_CASE(3)
          AFA_STEP_CASE(4)
          AFA_STEP_CASE(5)
          AFA_STEP_CASE(6)
          AFA_STEP_CASE(7)
          AFA_STEP_CASE(8)
          AFA_STEP_CASE(9)
          AFA_STEP_CASE(10)
          AFA_STEP_CASE(11)
          AFA_STEP_CASE(12)
#undef AFA_STEP_CASE
        }
        c += block;
      }
    }
  }
}

}  // namespace

void walk_step_rows(const WalkStepParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.walk.kind == Kind::f64) {
    step_rows<double>(p, begin, end, static_cast<double*>(scratch));
  } else {
    step_rows<float>(p, begin, end, static_cast<float*>(scratch));
  }
}

void walk_transition_rows(const WalkParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    transition_rows<double>(p, begin, end, scratch);
  } else {
    transition_rows<float>(p, begin, end, scratch);
  }
}

void walk_transition_backward_rows(const WalkParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.kind == Kind::f64) {
    transition_backward_rows<double>(p, begin, end, static_cast<double*>(scratch));
  } else {
    transition_backward_rows<float>(p, begin, end, static_cast<float*>(scratch));
  }
}

void walk_transpose_rows(const WalkParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    transpose_rows<double>(p, begin, end);
  } else {
    transpose_rows<float>(p, begin, end);
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
