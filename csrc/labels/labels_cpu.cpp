// Pseudo labels on the CPU; compiled once per SIMD level.
//
// Everything goes row by row with vectors along x. Halving and doubling, the published case, are written out:
// their weights are constants, where the general case looks up its samples in a table. A label row is made
// from the rows of the small maps in buffers that stay in the first-level cache: the enlarged maps,
// thresholds * classes * H * W values, are never written.
#include "common/vec.h"
#include "labels/labels.h"

namespace afa {
namespace AFA_SIMD {
namespace {

template <typename T>
struct IntOf;  // as wide as T, so that choices are selected by the comparison's own mask
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <typename T, typename In>
inline T value_of(In in) {
  return sizeof(In) == 1 ? static_cast<T>(in) / 255 : static_cast<T>(in);
}

// One row of a shrunken plane from the two rows it lies between; `weight` is the share of `second`.
template <typename T, typename In>
void shrink_row(const Axis& columns, const In* first, const In* second, T weight, T* out) {
  const T rest = 1 - weight, half = static_cast<T>(0.5);
  if (columns.from == columns.to) {
    for (int64_t x = 0; x < columns.to; ++x) {
      out[x] = rest * value_of<T>(first[x]) + weight * value_of<T>(second[x]);
    }
  } else if (columns.from == 2 * columns.to) {
#pragma GCC ivdep
    for (int64_t x = 0; x < columns.to; ++x) {
      const T above = half * value_of<T>(first[2 * x]) + half * value_of<T>(first[2 * x + 1]);
      const T below = half * value_of<T>(second[2 * x]) + half * value_of<T>(second[2 * x + 1]);
      out[x] = rest * above + weight * below;
    }
  } else {
    const T* share = static_cast<const T*>(columns.weight);
    for (int64_t x = 0; x < columns.to; ++x) {
      const int32_t l = columns.left[x], r = columns.right[x];
      const T above = (1 - share[x]) * value_of<T>(first[l]) + share[x] * value_of<T>(first[r]);
      const T below = (1 - share[x]) * value_of<T>(second[l]) + share[x] * value_of<T>(second[r]);
      out[x] = rest * above + weight * below;
    }
  }
}

template <typename T, typename In>
void shrink(const ShrinkParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / p.rows.to, y = item % p.rows.to;
    const In* in = static_cast<const In*>(p.in) + plane * p.rows.from * p.columns.from;
    shrink_row<T>(p.columns, in + p.rows.left[y] * p.columns.from, in + p.rows.right[y] * p.columns.from,
                  static_cast<const T*>(p.rows.weight)[y], static_cast<T*>(p.out) + item * p.columns.to);
  }
}

// The softmax over the background's score and the present classes, without the background's own share.
template <typename T>
void score_rows(const LabelParams& p, int64_t begin, int64_t end, T* scratch) {
  using V = typename Vec<T>::type;
  const int64_t height = p.down_rows.to, width = p.down_columns.to, length = width + kRowSlack;
  T* score = scratch;
  T* share = scratch + p.most * length;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / height, y = item % height;
    const int64_t count = p.count[b];
    for (int64_t j = 0; j < count; ++j) {
      const T* cam =
          static_cast<const T*>(p.cams) + b * p.cam_stride_b + p.plane[b * p.most + j] * p.cam_stride_c;
      shrink_row<T>(p.down_columns, cam + p.down_rows.left[y] * p.cam_stride_y,
                    cam + p.down_rows.right[y] * p.cam_stride_y, static_cast<const T*>(p.down_rows.weight)[y],
                    score + j * length);
    }
    for (int64_t t = 0; t < p.thresholds; ++t) {
      const V background = V{} + static_cast<T>(p.background[t]);
      T* out = static_cast<T*>(p.maps) + ((b * p.most * p.thresholds + t) * height + y) * width;
      const int64_t step = p.thresholds * height * width;
      for (int64_t x = 0; x < width; x += kLanes<T>) {
        V top = background;
        for (int64_t j = 0; j < count; ++j) top = larger(top, load<T>(score + j * length + x));
        V sum = exp_nonpositive(background - top);
        for (int64_t j = 0; j < count; ++j) {
          const V power = exp_nonpositive(load<T>(score + j * length + x) - top);
          sum += power;
          store<T>(share + j * length + x, power);
        }
        const V inverse = T{1} / sum;
        for (int64_t j = 0; j < count; ++j) {
          const V result = load<T>(share + j * length + x) * inverse;
          if (x + kLanes<T> <= width) {
            store<T>(out + j * step + x, result);
          } else {
            store_first<T>(out + j * step + x, result, width - x);
          }
        }
      }
    }
  }
}

// `in` has one more value on each side, which repeats the border's.
template <typename T>
void enlarge_row(const Axis& columns, const T* in, T* out) {
  const T near = static_cast<T>(0.75), far = static_cast<T>(0.25);
  if (columns.from == columns.to) {
    for (int64_t x = 0; x < columns.to; ++x) out[x] = in[x];
  } else if (columns.to == 2 * columns.from) {
#pragma GCC ivdep
    for (int64_t x = 0; x < columns.from; ++x) {
      out[2 * x] = far * in[x - 1] + near * in[x];
      out[2 * x + 1] = near * in[x] + far * in[x + 1];
    }
  } else {
    const T* share = static_cast<const T*>(columns.weight);
#pragma GCC ivdep
    for (int64_t x = 0; x < columns.to; ++x) {
      out[x] = (1 - share[x]) * in[columns.left[x]] + share[x] * in[columns.right[x]];
    }
  }
}

template <typename T>
void choice_rows(const LabelParams& p, int64_t begin, int64_t end, T* scratch) {
  using Int = typename IntOf<T>::type;
  const int64_t height = p.up_rows.to, width = p.up_columns.to;
  const int64_t small_height = p.up_rows.from, small_width = p.up_columns.from;
  T* row = scratch + 1;
  T* map = scratch + small_width + 2;
  T* best = map + width;
  T* sum = best + width;
  Int* choice =
      reinterpret_cast<Int*>(sum + width);  // against each background score: 0, or the class's label
  const T total = static_cast<T>(p.total);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / height, y = item % height;
    int64_t* labels = p.labels + item * width;
    int64_t first = 0, last = width;
    if (p.box != nullptr) {
      const int64_t* box = p.box + 4 * b;
      const bool inside = y >= box[0] && y < box[1];
      if (box[2] > first) first = box[2] < width ? box[2] : width;
      if (box[3] < last) last = box[3];
      if (!inside || last < first) last = first;
    }
    const int64_t count = first < last ? p.count[b] : 0;
    const T lower = static_cast<const T*>(p.up_rows.weight)[y], upper = 1 - lower;
    for (int64_t t = 0; t < p.thresholds; ++t) {
      Int* chosen = choice + t * width;
      for (int64_t x = 0; x < width; ++x) chosen[x] = 0;
      for (int64_t j = 0; j < count; ++j) {
        const T* plane = static_cast<const T*>(p.maps) +
                         ((b * p.most + j) * p.thresholds + t) * small_height * small_width;
        const T* above = plane + p.up_rows.left[y] * small_width;
        const T* below = plane + p.up_rows.right[y] * small_width;
        for (int64_t x = 0; x < small_width; ++x) row[x] = upper * above[x] + lower * below[x];
        row[-1] = row[0];
        row[small_width] = row[small_width - 1];
        enlarge_row(p.up_columns, row, map);
        const Int number = p.number[b * p.most + j];
        if (j == 0) {
          for (int64_t x = 0; x < width; ++x) {
            best[x] = sum[x] = map[x];
            chosen[x] = number;
          }
        } else {
#pragma GCC ivdep
          for (int64_t x = 0; x < width; ++x) {
            const bool better = map[x] > best[x];
            best[x] = better ? map[x] : best[x];
            chosen[x] = better ? number : chosen[x];
            sum[x] += map[x];
          }
        }
      }
      if (count == 0) continue;
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) chosen[x] = best[x] > total - sum[x] ? chosen[x] : 0;
    }
    const Int* high = choice;
    const Int* low = choice + (p.thresholds - 1) * width;
    const Int ignore = p.ignore;
    for (int64_t x = 0; x < first; ++x) labels[x] = ignore;
#pragma GCC ivdep
    for (int64_t x = first; x < last; ++x) {
      const Int unsure = low[x] != 0 ? ignore : 0;
      labels[x] = high[x] != 0 ? high[x] : unsure;
    }
    for (int64_t x = last; x < width; ++x) labels[x] = ignore;
  }
}

}  // namespace

void shrink_rows(const ShrinkParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    p.bytes ? shrink<double, uint8_t>(p, begin, end) : shrink<double, double>(p, begin, end);
  } else {
    p.bytes ? shrink<float, uint8_t>(p, begin, end) : shrink<float, float>(p, begin, end);
  }
}

void label_score_rows(const LabelParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    score_rows(p, begin, end, scratch);
  } else {
    score_rows(p, begin, end, reinterpret_cast<float*>(scratch));
  }
}

void label_choice_rows(const LabelParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    choice_rows(p, begin, end, scratch);
  } else {
    choice_rows(p, begin, end, reinterpret_cast<float*>(scratch));
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
