// The walk's transition on the CPU; compiled once per SIMD level. A thread owns rows of target nodes: it
// reads each affinity entry of their windows once (those of one source are adjacent, and stay in the
// first-level cache while the offsets pass), so that the N x N matrix is touched only inside the window, and
// nothing is shared.
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

// f(k, source row, dx, first x, end x): the targets of row y whose k-th source lies in the grid (none: end =
// first).
template <typename F>
inline void each_neighbour(const WalkParams& p, int64_t y, const F& f) {
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

template <typename T>
void transition_rows(const WalkParams& p, int64_t begin, int64_t end, T* sum) {
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    T* out = static_cast<T*>(p.out) + (b * p.stencil.size * p.height + y) * p.width;
    const int64_t plane = p.height * p.width;
    for (int64_t x = 0; x < p.width; ++x) sum[x] = static_cast<T>(p.eps);
    each_neighbour(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      T* weights = out + k * plane;
      for (int64_t x = 0; x < first; ++x) weights[x] = 0;
      for (int64_t x = last; x < p.width; ++x) weights[x] = 0;
      for (int64_t x = first; x < last; ++x) {
        weights[x] = affinity[affinity_index(p, b, row * p.width + x + dx, y * p.width + x, k)];
      }
      for (int64_t x = first; x < last; ++x) {
        weights[x] = raised(p, weights[x]);
        sum[x] += weights[x];
      }
    });
    if (!p.normalize) continue;
    for (int64_t x = 0; x < p.width; ++x) sum[x] = 1 / sum[x];
    for (int64_t k = 0; k < p.stencil.size; ++k) {
      for (int64_t x = 0; x < p.width; ++x) out[k * plane + x] *= sum[x];
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
      each_neighbour(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
        for (int64_t x = first; x < last; ++x) {
          const T value =
              raised(p, affinity[affinity_index(p, b, row * p.width + x + dx, y * p.width + x, k)]);
          sum[x] += value;
          dot[x] += grad[k * plane + x] * value;
        }
      });
      for (int64_t x = 0; x < p.width; ++x) dot[x] /= sum[x];
    }
    each_neighbour(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      for (int64_t x = first; x < last; ++x) {
        const int64_t at = affinity_index(p, b, row * p.width + x + dx, y * p.width + x, k);
        out[at] = (grad[k * plane + x] - dot[x]) / sum[x] * raised_derivative(p, affinity[at]);
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
    each_neighbour(p, y, [&](int64_t k, int64_t row, int64_t dx, int64_t first, int64_t last) {
      const T* from = in + (p.stencil.size - 1 - k) * plane + row * p.width + dx;
      T* to = out + k * plane;
      for (int64_t x = 0; x < first; ++x) to[x] = 0;
      for (int64_t x = first; x < last; ++x) to[x] = from[x];
      for (int64_t x = last; x < p.width; ++x) to[x] = 0;
    });
  }
}

}  // namespace

void walk_transition_rows(const WalkParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.kind == Kind::f64) {
    transition_rows<double>(p, begin, end, static_cast<double*>(scratch));
  } else {
    transition_rows<float>(p, begin, end, static_cast<float*>(scratch));
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
