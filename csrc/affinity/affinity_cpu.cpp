// Affinity from attention on the CPU; compiled once per SIMD level. Bound by memory: the K maps are read once
// in the forward pass, once more for the gradients of weight and bias, and their gradient is written once,
// each as whole rows in order (with a window, the part of each row from its first to its last node). Only the
// sum over the maps is transposed, which is K times smaller: transposing each map in place touches one cache
// line of every row, and was slower than everything else together. Sums are accumulated in a fixed order, by
// row or by block of rows, so results don't depend on the number of threads.
#include "affinity/affinity.h"
#include "common/half.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int kMapsAtOnce = 4;
constexpr int64_t kLine =
    16;  // nodes that ranges begin and end at multiples of: 64 bytes of float, a cache line

template <typename S>
inline typename Vec<S>::type sigmoid(typename Vec<S>::type z) {
  using V = typename Vec<S>::type;
  const V e = exp_nonpositive(z < S{0} ? z : -z);
  const V inverse = S{1} / (S{1} + e);
  return z < S{0} ? e * inverse : inverse;
}

// f(begin, end): ranges of whole cache lines that contain all nodes of node i's window, and few others. Whole
// lines, as a vector that crosses a line costs twice as much to store.
template <typename F>
inline void each_range(const PairLayout& p, int64_t i, const F& f) {
  if (p.radius < 0) {
    f(int64_t{0}, nodes_of(p));
    return;
  }
  const int64_t y = i / p.width, x = i % p.width;
  const int64_t top = y > p.radius ? y - p.radius : 0;
  const int64_t bottom = y + p.radius < p.height ? y + p.radius + 1 : p.height;
  const int64_t left = x > p.radius ? x - p.radius : 0;
  const int64_t right = x + p.radius < p.width ? x + p.radius + 1 : p.width;
  int64_t begin = (top * p.width + left) / kLine * kLine, end = begin;
  for (int64_t row = top; row < bottom; ++row) {
    const int64_t from = (row * p.width + left) / kLine * kLine;
    if (from > end) {
      f(begin, end);
      begin = from;
    }
    end = (row * p.width + right + kLine - 1) / kLine * kLine;
  }
  f(begin, end < nodes_of(p) ? end : nodes_of(p));
}

// f(first entry of the window, first node, number of both): the pairs of node i with the nodes of each grid
// row, starting `first_row` rows below.
template <typename F>
inline void each_window_row(const PairLayout& p, int64_t i, int64_t first_row, const F& f) {
  const int64_t y = i / p.width, x = i % p.width, side = 2 * p.radius + 1;
  const int64_t left = x > p.radius ? x - p.radius : 0;
  const int64_t right = x + p.radius < p.width ? x + p.radius + 1 : p.width;
  for (int64_t dy = first_row < -y ? -y : first_row; dy <= p.radius && y + dy < p.height; ++dy) {
    f((dy + p.radius) * side + left - x + p.radius, (y + dy) * p.width + left, right - left);
  }
}

template <typename T>
inline void fill(T* out, int64_t count) {
  __builtin_memset(out, 0, static_cast<size_t>(count) * sizeof(T));  // 0 in every type
}

// out = (FIRST ? 0 : out) + sum over MAPS of weight * source.
template <typename T, int MAPS, bool FIRST>
inline void add_maps(const T* source, int64_t stride, const Sum<T>* weight, Sum<T>* out, int64_t count) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>;
  int64_t x = 0;
  for (; x + kStep <= count; x += kStep) {
    V sum = FIRST ? V{} : load<Sum<T>>(out + x);
    for (int m = 0; m < MAPS; ++m) sum += weight[m] * load_wide(source + m * stride + x);
    store<Sum<T>>(out + x, sum);
  }
  if (x == count) return;
  V sum = FIRST ? V{} : load_wide_first(out + x, count - x);
  for (int m = 0; m < MAPS; ++m) sum += weight[m] * load_wide_first(source + m * stride + x, count - x);
  store_narrow_first(out + x, sum, count - x);
}

template <typename T>
void mix_rows(const AffinityParams& p, int64_t begin, int64_t end, Sum<T>* scratch) {
  const int64_t nodes = nodes_of(p.pairs), plane = nodes * nodes;
  const Sum<T>* weight = static_cast<const Sum<T>*>(p.weight);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / nodes, i = item % nodes;
    Sum<T>* mixed = static_cast<Sum<T>*>(p.mixed) + item * pairs_of_node(p.pairs);
    Sum<T>* row = p.pairs.windowed ? scratch : mixed;
    for (int64_t k = 0; k < p.maps; k += kMapsAtOnce) {
      const T* source = static_cast<const T*>(p.attention) + (b * p.maps + k) * plane + i * nodes;
      const Sum<T>* w = weight + k;
      each_range(p.pairs, i, [&](int64_t from, int64_t to) {
        const int64_t count = to - from;
        const T* at = source + from;
        Sum<T>* out = row + from;
        switch (p.maps - k) {
          case 1:
            k == 0 ? add_maps<T, 1, true>(at, plane, w, out, count)
                   : add_maps<T, 1, false>(at, plane, w, out, count);
            break;
          case 2:
            k == 0 ? add_maps<T, 2, true>(at, plane, w, out, count)
                   : add_maps<T, 2, false>(at, plane, w, out, count);
            break;
          case 3:
            k == 0 ? add_maps<T, 3, true>(at, plane, w, out, count)
                   : add_maps<T, 3, false>(at, plane, w, out, count);
            break;
          default:
            k == 0 ? add_maps<T, kMapsAtOnce, true>(at, plane, w, out, count)
                   : add_maps<T, kMapsAtOnce, false>(at, plane, w, out, count);
        }
      });
    }
    if (!p.pairs.windowed) continue;
    each_window_row(p.pairs, i, -p.pairs.radius, [&](int64_t entry, int64_t node, int64_t count) {
      for (int64_t n = 0; n < count; ++n) mixed[entry + n] = row[node + n];
    });
  }
}

// One tile of pairs (i, j) and its mirror (j, i), read, then written: `mixed` and `affinity` may be the same.
template <typename T>
void sigmoid_tile(const AffinityParams& p, int64_t b, int64_t i0, int64_t j0) {
  const int64_t nodes = nodes_of(p.pairs);
  const Sum<T>* mixed = static_cast<const Sum<T>*>(p.mixed) + b * nodes * nodes;
  T* affinity = static_cast<T*>(p.affinity) + b * nodes * nodes;
  const Sum<T> bias = *static_cast<const Sum<T>*>(p.bias);
  const int64_t rows = nodes - i0 < kAffinityTile ? nodes - i0 : kAffinityTile;
  const int64_t columns = nodes - j0 < kAffinityTile ? nodes - j0 : kAffinityTile;
  Sum<T> mirror[kAffinityTile][kAffinityTile + 1], value[kAffinityTile][kAffinityTile] = {};
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) mirror[c][r] = mixed[(j0 + c) * nodes + i0 + r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      value[r][c] = mixed[(i0 + r) * nodes + j0 + c] + mirror[c][r] + bias;
    for (int64_t c = 0; c < kAffinityTile; c += kLanes<Sum<T>>) {
      store<Sum<T>>(value[r] + c, sigmoid<Sum<T>>(load<Sum<T>>(value[r] + c)));
    }
    if (p.pairs.radius >= 0) {
      for (int64_t c = 0; c < columns; ++c) {
        if (pair_index(p.pairs, i0 + r, j0 + c) < 0) value[r][c] = 0;
      }
    }
  }
  auto write = [&](const Sum<T>* from, T* to, int64_t count) {
    for (int64_t n = 0; n < count; n += kLanes<Sum<T>>) {
      store_narrow_first(to + n, load_wide_first(from + n, count - n), count - n);
    }
  };
  for (int64_t r = 0; r < rows; ++r) write(value[r], affinity + (i0 + r) * nodes + j0, columns);
  if (i0 == j0) return;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) mirror[c][r] = value[r][c];
    write(mirror[c], affinity + (j0 + c) * nodes + i0, rows);
  }
}

// An item is the n-th tile row from the top and the n-th from the bottom, which always have the same number
// of tiles together.
template <typename T>
void sigmoid_dense(const AffinityParams& p, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(p.pairs), half = (tiles + 1) / 2;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / half, n = item % half;
    const int64_t last = tiles - 1 - n;
    for (int64_t row = n;; row = last) {
      for (int64_t column = row; column < tiles; ++column) {
        sigmoid_tile<T>(p, b, row * kAffinityTile, column * kAffinityTile);
      }
      if (row == last) break;
    }
  }
}

// An item is a node: its entries outside the grid, and both entries of its pairs with the nodes after it.
template <typename T>
void sigmoid_windowed(const AffinityParams& p, int64_t begin, int64_t end) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>;
  const int64_t nodes = nodes_of(p.pairs), window = window_of(p.pairs);
  const Sum<T> bias = *static_cast<const Sum<T>*>(p.bias);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item % nodes, first = (item - i) * window;
    const Sum<T>* mixed = static_cast<const Sum<T>*>(p.mixed) + first;
    T* affinity = static_cast<T*>(p.affinity) + first;
    int64_t done = 0;  // entries before this one are in the grid, or already 0
    each_window_row(p.pairs, i, -p.pairs.radius, [&](int64_t entry, int64_t, int64_t count) {
      fill(affinity + i * window + done, entry - done);
      done = entry + count;
    });
    fill(affinity + i * window + done, window - done);
    each_window_row(p.pairs, i, 0, [&](int64_t entry, int64_t node, int64_t count) {
      // The pair (i, i + offset) is stored at i and, with the opposite offset, at i + offset. In its own grid
      // row the node starts with itself.
      const int64_t skip = node < i ? i - node : 0;
      for (int64_t n = skip; n < count; n += kStep) {
        const int64_t lanes = count - n < kStep ? count - n : kStep;
        const int64_t forward = i * window + entry + n;
        const int64_t back = (node + n) * window + window - 1 - (entry + n);
        V z = {};
        for (int64_t l = 0; l < lanes; ++l) z[l] = mixed[forward + l] + mixed[back + l * (window - 1)] + bias;
        T a[kStep];
        store_narrow(a, sigmoid<Sum<T>>(z));
        for (int64_t l = 0; l < lanes; ++l) {
          affinity[forward + l] = a[l];
          affinity[back + l * (window - 1)] = a[l];
        }
      }
    });
  }
}

// Writes to `out`, for the rows i0, i0 + 1, ...: the gradient of the loss with respect to
// sum_k weight_k S_k[i, j], which is (dA_ij + dA_ji) A_ij (1 - A_ij); 0 outside the window.
template <typename T>
void logit_gradient(const AffinityParams& p, int64_t b, int64_t i0, int64_t rows, Sum<T>* out) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>;
  const int64_t nodes = nodes_of(p.pairs), window = window_of(p.pairs), stride = scratch_stride(p.pairs);
  const int64_t first = b * nodes * pairs_of_node(p.pairs);
  const T* grad = static_cast<const T*>(p.grad) + first;
  const T* affinity = static_cast<const T*>(p.affinity) + first;
  if (p.pairs.windowed) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r;
      Sum<T>* row = out + r * stride;
      fill(row, nodes);
      each_window_row(p.pairs, i, -p.pairs.radius, [&](int64_t entry, int64_t node, int64_t count) {
        for (int64_t n = 0; n < count; n += kStep) {
          const int64_t lanes = count - n < kStep ? count - n : kStep;
          const int64_t back = (node + n) * window + window - 1 - (entry + n);
          V g = load_wide_first(grad + i * window + entry + n, lanes);
          const V a = load_wide_first(affinity + i * window + entry + n, lanes);
          for (int64_t l = 0; l < lanes; ++l) g[l] += widen_one(grad + back + l * (window - 1));
          store_narrow_first(row + node + n, g * a * (Sum<T>{1} - a), lanes);
        }
      });
    }
    return;
  }
  for (int64_t j = 0; j < nodes; ++j) {
    Sum<T> line[kAffinityRows];
    for (int64_t r = 0; r < rows; r += kStep) {
      store<Sum<T>>(line + r, load_wide_first(grad + j * nodes + i0 + r, rows - r));
    }
    for (int64_t r = 0; r < rows; ++r) out[r * stride + j] = line[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    Sum<T>* row = out + r * stride;
    const int64_t at = (i0 + r) * nodes;
    for (int64_t j = 0; j < nodes; j += kStep) {
      const int64_t left = nodes - j;
      const V g = load_wide_first(row + j, left) + load_wide_first(grad + at + j, left);
      const V a = load_wide_first(affinity + at + j, left);
      store_narrow_first(row + j, g * a * (Sum<T>{1} - a), left);
    }
    if (p.pairs.radius < 0) continue;
    for (int64_t j = 0; j < nodes; ++j) {
      if (pair_index(p.pairs, i0 + r, j) < 0) row[j] = 0;
    }
  }
}

template <typename T>
void backward_attention(const AffinityParams& p, int64_t begin, int64_t end, Sum<T>* scratch) {
  constexpr int64_t kStep = kLanes<Sum<T>>;
  const int64_t nodes = nodes_of(p.pairs), blocks = blocks_of(p.pairs);
  const Sum<T>* weight = static_cast<const Sum<T>*>(p.weight);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks, i0 = item % blocks * kAffinityRows;
    const int64_t rows = nodes - i0 < kAffinityRows ? nodes - i0 : kAffinityRows;
    logit_gradient<T>(p, b, i0, rows, scratch);
    for (int64_t k = 0; k < p.maps; ++k) {
      for (int64_t r = 0; r < rows; ++r) {
        const Sum<T>* row = scratch + r * scratch_stride(p.pairs);
        T* out = static_cast<T*>(p.grad_attention) + ((b * p.maps + k) * nodes + i0 + r) * nodes;
        int64_t done = 0;
        each_range(p.pairs, i0 + r, [&](int64_t from, int64_t to) {
          fill(out + done, from - done);
          for (int64_t j = from; j < to; j += kStep) {
            store_narrow_first(out + j, weight[k] * load_wide_first(row + j, to - j), to - j);
          }
          done = to;
        });
        fill(out + done, nodes - done);
      }
    }
  }
}

// sum over x of a * b, in an order that depends only on `count`. Where a is 0, b is ignored: it may be NaN.
template <typename T>
inline SumVec<T> products(const Sum<T>* a, const T* b, int64_t count) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>, kChains = 4;
  V sum[kChains] = {};
  auto add = [&](V& to, int64_t x) {
    const V factor = load_wide_first(a + x, count - x), value = load_wide_first(b + x, count - x);
    to += factor * (factor == V{} ? V{} : value);
  };
  int64_t x = 0;
  for (; x + kChains * kStep <= count; x += kChains * kStep) {
    for (int64_t c = 0; c < kChains; ++c) add(sum[c], x + c * kStep);
  }
  for (; x < count; x += kStep) add(sum[0], x);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <typename V, typename S>
inline S sum_of_lanes(V v, S start) {
  for (int l = 0; l < kLanes<S>; ++l) start += v[l];
  return start;
}

template <typename T>
void backward_weight(const AffinityParams& p, int64_t begin, int64_t end, Sum<T>* scratch) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>;
  const int64_t nodes = nodes_of(p.pairs), blocks = blocks_of(p.pairs);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks, i0 = item % blocks * kAffinityRows;
    const int64_t rows = nodes - i0 < kAffinityRows ? nodes - i0 : kAffinityRows;
    Sum<T>* partial = static_cast<Sum<T>*>(p.partial) + item * (p.maps + 1);
    logit_gradient<T>(p, b, i0, rows, scratch);
    for (int64_t k = 0; k < p.maps; ++k) {
      V sum = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Sum<T>* row = scratch + r * scratch_stride(p.pairs);
        const T* source = static_cast<const T*>(p.attention) + ((b * p.maps + k) * nodes + i0 + r) * nodes;
        each_range(p.pairs, i0 + r, [&](int64_t from, int64_t to) {
          sum += products<T>(row + from, source + from, to - from);
        });
      }
      partial[k] = sum_of_lanes(sum, Sum<T>{0});
    }
    // Each pair's gradient with respect to the bias is in both of its entries.
    V sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Sum<T>* row = scratch + r * scratch_stride(p.pairs);
      for (int64_t j = 0; j < nodes; j += kStep) sum += load_wide_first(row + j, nodes - j);
    }
    partial[p.maps] = sum_of_lanes(sum, Sum<T>{0}) / 2;
  }
}

template <typename T>
void loss_blocks(const AffinityLossParams& p, int64_t begin, int64_t end) {
  using V = SumVec<T>;
  constexpr int64_t kStep = kLanes<Sum<T>>;
  typedef uint8_t Labels __attribute__((vector_size(kStep)));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLossBlock;
    const int64_t count = p.count - first < kLossBlock ? p.count - first : kLossBlock;
    const T* affinity = static_cast<const T*>(p.affinity) + first;
    const uint8_t* labels = p.labels + first;
    V error[kPairGroups] = {}, pairs[kPairGroups] = {};
    for (int64_t x = 0; x < count; x += kStep) {
      Labels label = Labels{} + 255;
      __builtin_memcpy(&label, labels + x, static_cast<size_t>(count - x < kStep ? count - x : kStep));
      const V kind = __builtin_convertvector(label, V), a = load_wide_first(affinity + x, count - x);
      const V none = {}, one = none + Sum<T>{1};
      // Products, not selections: a NaN propagates whatever its label is, as in the definition.
      for (int g = 0; g < kPairGroups; ++g) {
        const V in_group = kind == none + Sum<T>(g) ? one : none;
        error[g] += (g == 0 ? a : one - a) * in_group;
        pairs[g] += in_group;
      }
    }
    double* partial = p.partial + 2 * kPairGroups * block;
    for (int g = 0; g < kPairGroups; ++g) {
      partial[g] = static_cast<double>(sum_of_lanes(error[g], Sum<T>{0}));
      partial[kPairGroups + g] = static_cast<double>(sum_of_lanes(pairs[g], Sum<T>{0}));
    }
  }
}

template <typename S>
void loss_backward_blocks(const AffinityLossParams& p, int64_t begin, int64_t end) {
  using V = typename Vec<S>::type;
  constexpr int64_t kStep = kLanes<S>;
  typedef uint8_t Labels __attribute__((vector_size(kStep)));
  const S grad = *static_cast<const S*>(p.grad);
  const S* sums = static_cast<const S*>(p.sums);
  const V none = {};
  S* out = static_cast<S*>(p.grad_affinity);
  const int64_t last = end * kLossBlock < p.count ? end * kLossBlock : p.count;
  for (int64_t x = begin * kLossBlock; x < last; x += kStep) {
    Labels label = {};
    __builtin_memcpy(&label, p.labels + x, static_cast<size_t>(last - x < kStep ? last - x : kStep));
    const V kind = __builtin_convertvector(label, V);
    V gradient = none;
    for (int g = 0; g < kPairGroups; ++g) {
      gradient = kind == none + static_cast<S>(g) ? none + grad * sums[1 + g] : gradient;
    }
    store_narrow_first(out + x, gradient, last - x);
  }
}

}  // namespace

void affinity_mix_rows(const AffinityParams& p, int64_t begin, int64_t end, void* scratch) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    mix_rows<T>(p, begin, end, static_cast<Sum<T>*>(scratch));
  });
}

void affinity_sigmoid_items(const AffinityParams& p, int64_t begin, int64_t end) {
  with_type(p.kind, [&](auto type) {
    if (p.pairs.windowed) {
      sigmoid_windowed<decltype(type)>(p, begin, end);
    } else {
      sigmoid_dense<decltype(type)>(p, begin, end);
    }
  });
}

void affinity_backward_attention_blocks(const AffinityParams& p, int64_t begin, int64_t end, void* scratch) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    backward_attention<T>(p, begin, end, static_cast<Sum<T>*>(scratch));
  });
}

void affinity_backward_weight_blocks(const AffinityParams& p, int64_t begin, int64_t end, void* scratch) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    backward_weight<T>(p, begin, end, static_cast<Sum<T>*>(scratch));
  });
}

void affinity_label_rows(const AffinityLabelParams& p, int64_t begin, int64_t end) {
  const int64_t nodes = nodes_of(p.pairs), size = pairs_of_node(p.pairs);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item % nodes;
    const int64_t* tokens = p.tokens + (item - i);
    uint8_t* labels = p.labels + item * size;
    const int64_t own = tokens[i];
    __builtin_memset(labels, 255, static_cast<size_t>(size));
    if (own == p.ignore) continue;
    each_window_row(p.pairs, i, -p.pairs.radius, [&](int64_t entry, int64_t node, int64_t count) {
      uint8_t* out = labels + (p.pairs.windowed ? entry : node);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t other = tokens[node + n];
        out[n] = other == p.ignore ? 255 : pair_label(p, own, other);
      }
    });
  }
}

void affinity_loss_blocks(const AffinityLossParams& p, int64_t begin, int64_t end) {
  with_type(p.kind, [&](auto type) { loss_blocks<decltype(type)>(p, begin, end); });
}

void affinity_loss_backward_blocks(const AffinityLossParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    loss_backward_blocks<double>(p, begin, end);
  } else {
    loss_backward_blocks<float>(p, begin, end);
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
