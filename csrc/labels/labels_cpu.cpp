// Pseudo labels on the CPU; compiled once per SIMD level.
//
// All loops run row by row with vectors along x. Downscaling and upsampling by 2, the published case, have
// their own code with constant weights; the general case looks up its samples in a table. A label row is
// computed from the rows of the small maps in buffers that stay in the L1 cache: the upsampled maps,
// thresholds * classes * H * W values, are never stored.
#include "common/vec.h"
#include "labels/labels.h"

namespace afa {
namespace AFA_SIMD {
namespace {

template <typename T>
struct IntOf;  // as wide as T, so that choices are selected by the comparison's mask
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

// One row of a downscaled plane from the two rows that it is between; `weight` is that of `second`.
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
    const In* in = static_cast<const In*>(p.in) + plane * p.in_stride_p;
    shrink_row<T>(p.columns, in + p.rows.left[y] * p.in_stride_y, in + p.rows.right[y] * p.in_stride_y,
                  static_cast<const T*>(p.rows.weight)[y], static_cast<T*>(p.out) + item * p.columns.to);
  }
}

// The softmax over the background score and the present classes, without the background's value.
template <typename T>
void score_rows(const ScoreParams& p, int64_t begin, int64_t end, T* scratch) {
  using V = typename Vec<T>::type;
  const int64_t height = p.rows.to, width = p.columns.to, length = width + kRowSlack;
  const int64_t most = p.classes.most;
  T* score = scratch;
  T* share = scratch + most * length;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / height, y = item % height;
    const int64_t count = p.classes.count[b];
    for (int64_t j = 0; j < count; ++j) {
      const T* cam =
          static_cast<const T*>(p.cams) + b * p.cam_stride_b + p.classes.plane[b * most + j] * p.cam_stride_c;
      shrink_row<T>(p.columns, cam + p.rows.left[y] * p.cam_stride_y, cam + p.rows.right[y] * p.cam_stride_y,
                    static_cast<const T*>(p.rows.weight)[y], score + j * length);
    }
    for (int64_t t = 0; t < p.thresholds; ++t) {
      const V background = V{} + static_cast<T>(p.background[t]);
      T* out = static_cast<T*>(p.maps) + ((b * most * p.thresholds + t) * height + y) * width;
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

template <typename T>
void place_rows(const PlaceParams& p, int64_t begin, int64_t end, T* scratch) {
  const T* column_weight = static_cast<const T*>(p.column_weight);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t map = item / p.map_height, y = item % p.map_height;
    const int64_t j = map / p.thresholds, t = map % p.thresholds;
    const int64_t plane = j == 0 ? 0 : 1 + p.classes.plane[j - 1];
    const T* scores = static_cast<const T*>(p.scores[t]) + plane * p.grid_height * p.grid_width;
    for (int64_t x = 0; x < p.grid_width; ++x) scratch[x] = 0;
    for (int n = 0; n < 4; ++n) {
      const T weight = static_cast<const T*>(p.row_weight)[4 * y + n];
      const T* row = scores + p.row_at[4 * y + n] * p.grid_width;
      for (int64_t x = 0; x < p.grid_width; ++x) scratch[x] += weight * row[x];
    }
    T* out = static_cast<T*>(p.maps) + item * p.map_width;
    for (int64_t x = 0; x < p.map_width; ++x) {
      T sum = 0;
      for (int n = 0; n < 4; ++n) sum += column_weight[4 * x + n] * scratch[p.column_at[4 * x + n]];
      out[x] = sum;
    }
  }
}

// `in` has one more value on each side, which replicates the border's value.
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
void choice_rows(const ChoiceParams& p, int64_t begin, int64_t end, T* scratch) {
  using Int = typename IntOf<T>::type;
  const int64_t width = p.columns.to, map_width = p.columns.from;
  const int64_t extra = p.background_map ? 1 : 0, maps = (p.classes.most + extra) * p.thresholds;
  T* row = scratch + 1;
  T* map = scratch + map_width + 2;
  T* best = map + width;
  T* background = best + width;
  Int* choice = reinterpret_cast<Int*>(background + width);  // for each threshold: 0, or the class's label
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    int64_t* labels = p.labels + item * p.width;
    int64_t first = 0, last = p.width;
    if (p.box != nullptr) {
      const int64_t* box = p.box + 4 * b;
      const bool inside = y >= box[0] && y < box[1];
      if (box[2] > first) first = box[2] < last ? box[2] : last;
      if (box[3] < last) last = box[3];
      if (!inside || last < first) last = first;
    }
    for (int64_t x = 0; x < first; ++x) labels[x] = p.ignore;
    for (int64_t x = last; x < p.width; ++x) labels[x] = p.ignore;
    if (first == last) continue;
    const int64_t count = p.classes.count[b], from = y - p.y;
    const T lower = static_cast<const T*>(p.rows.weight)[from], upper = 1 - lower;
    auto enlarged = [&](int64_t index) {
      const T* plane = static_cast<const T*>(p.maps) + (b * maps + index) * p.map_height * p.map_width;
      const T* above = plane + p.rows.left[from] * p.map_width;
      const T* below = plane + p.rows.right[from] * p.map_width;
      for (int64_t x = 0; x < map_width; ++x) row[x] = upper * above[x] + lower * below[x];
      row[-1] = row[0];
      row[map_width] = row[map_width - 1];
      enlarge_row(p.columns, row, map);
    };
    for (int64_t t = 0; t < p.thresholds; ++t) {
      Int* chosen = choice + t * width;
      if (count == 0) {
        for (int64_t x = 0; x < width; ++x) chosen[x] = 0;
        continue;
      }
      if (p.background_map) {
        enlarged(t);
        for (int64_t x = 0; x < width; ++x) background[x] = map[x];
      } else {
        for (int64_t x = 0; x < width; ++x) background[x] = static_cast<T>(p.total);
      }
      const bool given = p.background_map;  // otherwise `total` minus the classes
      for (int64_t j = 0; j < count; ++j) {
        enlarged((j + extra) * p.thresholds + t);
        const Int number = p.classes.number[b * p.classes.most + j];
        if (j == 0) {
          for (int64_t x = 0; x < width; ++x) {
            best[x] = map[x];
            chosen[x] = number;
            background[x] -= given ? T{0} : map[x];
          }
        } else {
#pragma GCC ivdep
          for (int64_t x = 0; x < width; ++x) {
            const bool better = map[x] > best[x] || (map[x] != map[x] && best[x] == best[x]);
            best[x] = better ? map[x] : best[x];
            chosen[x] = better ? number : chosen[x];
            background[x] -= given ? T{0} : map[x];
          }
        }
      }
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) {
        const bool over = !(best[x] <= background[x]) & (background[x] == background[x]);
        chosen[x] = over ? chosen[x] : 0;
      }
    }
    const Int* high = choice - p.x;
    const Int* low = choice + (p.thresholds - 1) * width - p.x;
    const Int ignore = p.ignore;
#pragma GCC ivdep
    for (int64_t x = first; x < last; ++x) {
      const Int unsure = low[x] != 0 ? ignore : 0;
      labels[x] = high[x] != 0 ? high[x] : unsure;
    }
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

void label_score_rows(const ScoreParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    score_rows(p, begin, end, scratch);
  } else {
    score_rows(p, begin, end, reinterpret_cast<float*>(scratch));
  }
}

void label_place_rows(const PlaceParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    place_rows(p, begin, end, scratch);
  } else {
    place_rows(p, begin, end, reinterpret_cast<float*>(scratch));
  }
}

void label_choice_rows(const ChoiceParams& p, int64_t begin, int64_t end, double* scratch) {
  if (p.kind == Kind::f64) {
    choice_rows(p, begin, end, scratch);
  } else {
    choice_rows(p, begin, end, reinterpret_cast<float*>(scratch));
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
