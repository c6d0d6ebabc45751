// The permutohedral lattice and the mean field on the CPU; compiled once per SIMD level.
//
// Channels are contiguous per pixel and per vertex and padded to chunks of 8. A tile of up to 4 chunks keeps
// its sums in registers while a vertex gathers its pixels, or a pixel its vertices. An iteration writes each
// vertex value once per blur and each probability once: slicing of both kernels, unaries and softmax are one
// pass. Scattering pixels into the table, the usual way, reads and writes 6 rows per pixel and needs a table
// per thread.
#include "common/half.h"
#include "common/vec.h"
#include "crf/crf.h"

// Chunks are wider than the registers of some levels. Functions that take or return them are in this file
// only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace afa {
namespace AFA_SIMD {
namespace {

template <typename T>
struct ChunkOf {
  typedef T type __attribute__((vector_size(kChunk * sizeof(T))));
};
template <typename T>
using Chunk = typename ChunkOf<T>::type;
using Floats = Chunk<float>;
using Doubles = Chunk<double>;
using Ints = Chunk<int32_t>;

template <typename T>
inline Chunk<T> get(const T* p) {
  Chunk<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void put(T* p, const Chunk<T>& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline Floats upper(const Floats& a, const Floats& b) {
  return a > b ? a : b;
}
inline Floats as_floats8(const Ints& bits) {
  Floats v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
inline Ints as_ints8(const Floats& v) {
  Ints bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}

// v with its lanes moved: lane k is lane (k ^ N) of v.
template <int N>
inline Floats swapped(const Floats& v) {
  return __builtin_shufflevector(v, v, 0 ^ N, 1 ^ N, 2 ^ N, 3 ^ N, 4 ^ N, 5 ^ N, 6 ^ N, 7 ^ N);
}
// The largest lane, and the sum of all, in every lane.
inline Floats largest_lane(Floats v) {
  v = upper(v, swapped<4>(v));
  v = upper(v, swapped<2>(v));
  return upper(v, swapped<1>(v));
}
inline Floats lane_sum(Floats v) {
  v += swapped<4>(v);
  v += swapped<2>(v);
  return v + swapped<1>(v);
}

// An 8 x 8 matrix in place: by single lanes, pairs, and fours.
template <typename T>
inline void transpose(Chunk<T> (&m)[kChunk]) {
  Chunk<T> n[kChunk];
  for (int i = 0; i < 8; i += 2) {
    n[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    n[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    m[i] = __builtin_shufflevector(n[i], n[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    m[i + 2] = __builtin_shufflevector(n[i], n[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    n[i] = __builtin_shufflevector(m[i], m[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    n[i + 4] = __builtin_shufflevector(m[i], m[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) m[i] = n[i];
}

// A product rounded to float, which the compiler cannot make part of a fused multiply-add: all levels, and
// the CUDA kernels, then find the same vertices.
inline Floats rounded_product(const Floats& a, const Floats& b) {
  return __builtin_convertvector(__builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles),
                                 Floats);
}

// Whether these are the numbers of a whole chunk of consecutive pixels.
inline bool is_run(const int32_t* order, int64_t count) {
  return count >= kChunk && order[kChunk - 1] - order[0] == kChunk - 1;
}

template <int D>
void simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys, bool* valid) {
  constexpr int E = D + 1;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
  const int bits = key_bits(D);
  const float limit = static_cast<float>(key_limit(D));
  const Floats inverse = Floats{} + 1.0f / E;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    Floats elevated[E], sum = {};
    for (int j = D; j > 0; --j) {
      const float* plane = p.features + (j - 1) * p.pixels;
      Floats f = {};
      if (is_run(p.order + first, count)) {
        f = get(plane + p.order[first]);
      } else {
        for (int64_t i = 0; i < count; ++i) f[i] = plane[p.order[first + i]];
      }
      const Floats scaled = rounded_product(f, Floats{} + p.scale[j - 1]);
      elevated[j] = sum - rounded_product(scaled, Floats{} + static_cast<float>(j));
      sum += scaled;
    }
    elevated[0] = sum;
    Floats rest[E], largest = {};
    Ints cell[E], total = {};
    for (int i = 0; i < E; ++i) {
      Floats v = rounded_product(inverse, elevated[i]);
      largest = upper(largest, upper(v, -v));
      v = (v + kRound) - kRound;
      rest[i] = elevated[i] - v * static_cast<float>(E);
      cell[i] = __builtin_convertvector(v, Ints);
      total += cell[i];
    }
    const Ints good = (largest < limit) & (sum - sum == 0);  // the second: no feature is NaN or infinite
    for (int i = 0; i < kChunk; ++i) *valid = *valid && good[i] != 0;
    if (!*valid) return;
    Ints rank[E] = {};
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j < E; ++j) {
        const Ints less = rest[i] < rest[j];
        rank[i] -= less;
        rank[j] += less + 1;
      }
    }
    Floats sorted[E] = {};
    for (int i = 0; i < E; ++i) {
      rank[i] += total;
      const Ints step = (rank[i] > D) - (rank[i] < 0);  // -1 where above, 1 where below
      rank[i] += step * E;
      cell[i] += step;
      rest[i] -= __builtin_convertvector(step * E, Floats);
      const Floats value = rounded_product(rest[i], inverse);
      for (int r = 0; r < E; ++r) sorted[r] = rank[i] == r ? value : sorted[r];
    }
    Floats share[E];
    share[0] = sorted[D] + (1.0f - sorted[0]);
    for (int r = 1; r < E; ++r) share[r] = sorted[D - r] - sorted[D - r + 1];
    for (int64_t i = 0; i < count; ++i) {
      float* weight = p.weight + (first + i) * E;
      uint64_t* key = keys + (first - begin + i) * E;
      uint64_t unit[E];
      uint64_t at = 0;
      for (int j = 0; j < E; ++j) {
        const uint64_t one = j < D ? uint64_t{1} << (3 + j * bits) : 0;
        unit[rank[j][i]] = one;
        at += one * static_cast<uint64_t>(cell[j][i] + key_bias(D));
      }
      key[0] = at;
      weight[0] = share[0][i];
      for (int r = 1; r < E; ++r) {
        at += 1 - unit[D - r + 1];
        key[r] = at;
        weight[r] = share[r][i];
      }
    }
  }
}

template <typename T, int K>
void splat(const SplatParams& p, int64_t begin, int64_t end) {
  const T* in = static_cast<const T*>(p.in);
  T* table = static_cast<T*>(p.table);
  for (int64_t v = begin; v < end; ++v) {
    Chunk<T> sum[K] = {};
    if (v < p.lattice.vertices) {
      const int64_t last = p.lattice.start[v + 1];
      for (int64_t e = p.lattice.start[v]; e < last; ++e) {
        const T share = static_cast<T>(p.share[e]);
        const T* row = in + p.lattice.pixel[e] * p.stride;
        for (int k = 0; k < K; ++k) sum[k] += share * get(row + k * kChunk);
      }
    }
    for (int k = 0; k < K; ++k) put(table + (v * K + k) * kChunk, sum[k]);
  }
}

template <typename T, int K>
void blur(const BlurParams& p, int64_t begin, int64_t end) {
  const T* in = static_cast<const T*>(p.in);
  T* out = static_cast<T*>(p.out);
  const int32_t* neighbor = p.lattice.neighbor + 2 * p.axis * p.lattice.vertices;
  const int64_t last = end < p.lattice.vertices ? end : p.lattice.vertices;
  constexpr int64_t kRow = K * kChunk;
  for (int64_t v = begin; v < last; ++v) {
    const T* left = in + neighbor[2 * v] * kRow;
    const T* right = in + neighbor[2 * v + 1] * kRow;
    for (int k = 0; k < K; ++k) {
      put(out + v * kRow + k * kChunk,
          get(in + v * kRow + k * kChunk) +
              static_cast<T>(0.5) * (get(left + k * kChunk) + get(right + k * kChunk)));
    }
  }
  if (end > p.lattice.vertices) {
    for (int k = 0; k < K; ++k) put(out + p.lattice.vertices * kRow + k * kChunk, Chunk<T>{});
  }
}

// log(x) for finite x > 0, no subnormal: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), log(m) by a degree-9
// polynomial in m - 1 (Cephes). Relative error under 2e-7.
inline Floats logarithm(const Floats& x) {
  const Ints bits = as_ints8(x);
  const Ints shifted = bits - 0x3f3504f3;
  const Floats exponent = __builtin_convertvector(shifted >> 23, Floats);
  const Floats m = as_floats8((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Floats square = m * m;
  return ((p * m * square + exponent * -2.12194440e-4f) - 0.5f * square + m) + exponent * 0.693359375f;
}

// As exp_nonpositive in vec.h, on a chunk.
inline Floats exponential(Floats x) {
  constexpr float kRound = 12582912.0f + 127;
  x = upper(x, Floats{} - 87.0f);
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as_floats8(as_ints8(shifted) << 23);
}

template <typename T>
inline Chunk<Sum<T>> widen_chunk(const T* from, const int32_t* order, int64_t count) {
  using S = Sum<T>;
  T values[kChunk] = {};
  if (is_run(order, count)) {
    __builtin_memcpy(values, from + order[0], sizeof values);
  } else {
    for (int64_t k = 0; k < kChunk && k < count; ++k) values[k] = from[order[k]];
  }
  S wide[kChunk > kLanes<S> ? kChunk : kLanes<S>];
  for (int64_t k = 0; k < kChunk; k += kLanes<S>) store<S>(wide + k, load_wide_first(values + k, kChunk - k));
  return get(wide);
}
inline Floats widen_chunk(const float* from, const int32_t* order, int64_t count) {
  if (is_run(order, count)) return get(from + order[0]);
  Floats v = {};
  for (int64_t k = 0; k < kChunk && k < count; ++k) v[k] = from[order[k]];
  return v;
}

inline Floats log_chunk(const Floats& v) {
  return logarithm(upper(v, Floats{} + 1e-5f));
}
inline Doubles log_chunk(const Doubles& v) {
  return __builtin_convertvector(log_chunk(__builtin_convertvector(v, Floats)), Doubles);
}

// Rows [pixels, stride], of the type Out, from planes, for one block of pixels.
template <typename T, typename Out>
void gather(const GatherParams& p, int64_t block) {
  using S = Sum<T>;
  const int64_t first = block * kPixelBlock;
  const int64_t last = p.pixels < first + kPixelBlock ? p.pixels : first + kPixelBlock;
  const T* planes = static_cast<const T*>(p.planes);
  for (int64_t i = first; i < last; i += kChunk) {
    for (int64_t c = 0; c < p.chunks * kChunk; c += kChunk) {
      Chunk<Out> tile[kChunk];
      for (int64_t k = 0; k < kChunk; ++k) {
        if (c + k >= p.channels) {
          tile[k] = Chunk<Out>{} + static_cast<Out>(p.padding);
          continue;
        }
        const int64_t plane = p.index == nullptr ? c + k : p.index[c + k];
        Chunk<S> v = widen_chunk(planes + plane * p.pixels, p.order + i, last - i);
        if (p.log) v = log_chunk(v);
        if (p.negate) v = -v;
        tile[k] = __builtin_convertvector(v, Chunk<Out>);
      }
      transpose<Out>(tile);
      Out* rows = static_cast<Out*>(p.rows) + i * p.stride + c;
      for (int64_t k = 0; k < kChunk && i + k < last; ++k) {
        put(rows + k * p.stride, p.factor == nullptr ? tile[k] : tile[k] * static_cast<Out>(p.factor[i + k]));
      }
    }
  }
}

// The reverse, for rows of a block in cache; rows up to a whole chunk of pixels can be read.
template <typename T>
void write_planes(const Sum<T>* rows, int64_t stride, int64_t channels, const int32_t* index,
                  const int32_t* order, int64_t count, int64_t pixels, T* planes) {
  using S = Sum<T>;
  for (int64_t i = 0; i < count; i += kChunk) {
    const bool run = is_run(order + i, count - i);
    for (int64_t c = 0; c < channels; c += kChunk) {
      Chunk<S> tile[kChunk];
      for (int64_t k = 0; k < kChunk; ++k) tile[k] = get(rows + (i + k) * stride + c);
      transpose<S>(tile);
      for (int64_t k = 0; k < kChunk && c + k < channels; ++k) {
        T* to = planes + (index == nullptr ? c + k : index[c + k]) * pixels;
        S wide[kChunk > kLanes<S> ? kChunk : kLanes<S>] = {};
        T values[kChunk];
        put(wide, tile[k]);
        for (int64_t n = 0; n < kChunk; n += kLanes<S>)
          store_narrow_first(values + n, load<S>(wide + n), kChunk - n);
        if (run) {
          __builtin_memcpy(to + order[i], values, sizeof values);
        } else {
          for (int64_t n = 0; n < kChunk && i + n < count; ++n) to[order[i + n]] = values[n];
        }
      }
    }
  }
}

template <typename T, int K>
inline void slice_pixel(const Lattice& lattice, const T* table, int64_t i, Chunk<T> (&sum)[K]) {
  const int64_t corners = lattice.dims + 1;
  const int32_t* offset = lattice.offset + i * corners;
  const float* weight = lattice.weight + i * corners;
  for (int64_t e = 0; e < corners; ++e) {
    const T w = static_cast<T>(weight[e]);
    const T* row = table + offset[e] * (K * kChunk);
    for (int k = 0; k < K; ++k) sum[k] += w * get(row + k * kChunk);
  }
}

template <typename T, int K>
void slice(const SliceParams& p, int64_t begin, int64_t end) {
  using S = Sum<T>;
  S rows[kPixelBlock * K * kChunk];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kPixelBlock, pixels = p.lattice.pixels;
    const int64_t count = pixels - first < kPixelBlock ? pixels - first : kPixelBlock;
    for (int64_t i = 0; i < count; ++i) {
      Chunk<S> sum[K] = {};
      slice_pixel<S, K>(p.lattice, static_cast<const S*>(p.table), first + i, sum);
      const S factor = static_cast<S>(p.factor[first + i]);
      for (int k = 0; k < K; ++k) put(rows + (i * K + k) * kChunk, factor * sum[k]);
    }
    write_planes<T>(rows, K * kChunk, p.channels, nullptr, p.order + first, count, pixels,
                    static_cast<T*>(p.planes));
  }
}

// Calls f with the number of chunks as a type.
template <int K>
struct Width {
  static constexpr int value = K;
};
template <typename F>
inline void with_width(int64_t chunks, const F& f) {
  switch (chunks) {
    case 1:
      f(Width<1>{});
      break;
    case 2:
      f(Width<2>{});
      break;
    case 3:
      f(Width<3>{});
      break;
    default:
      f(Width<4>{});
  }
}

inline void softmax_row(float* values, int64_t row) {
  Floats top = get(values);
  for (int64_t c = kChunk; c < row; c += kChunk) top = upper(top, get(values + c));
  const Floats best = largest_lane(top);
  Floats sum = {};
  for (int64_t c = 0; c < row; c += kChunk) {
    const Floats power = exponential(get(values + c) - best);
    sum += power;
    put(values + c, power);
  }
  const Floats inverse = 1.0f / lane_sum(sum);
  for (int64_t c = 0; c < row; c += kChunk) put(values + c, get(values + c) * inverse);
}

// rows -= C f for each row's filtered values f, which rows hold on entry.
void mix_classes(const FieldParams& p, const float* logits, float* rows, int64_t count, float* mixed) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows + i * p.row;
    for (int64_t c = 0; c < p.row; ++c) mixed[c] = 0;
    for (int64_t from = 0; from < p.channels; ++from) {
      const float value = row[from];
      const float* factor = p.compatibility + from * p.row;
      for (int64_t c = 0; c < p.row; ++c) mixed[c] += value * factor[c];
    }
    for (int64_t c = 0; c < p.row; ++c) row[c] = logits[i * p.row + c] - mixed[c];
  }
}

template <int K>
inline void slice_tile(const FieldParams& p, int64_t column, int64_t first, int64_t count, float* rows) {
  const float* table[kMaxKernels];
  for (int n = 0; n < p.kernels; ++n) {
    table[n] = p.kernel[n].table + column * (p.kernel[n].lattice.vertices + 1);
  }
  for (int64_t i = first; i < first + count; ++i) {
    float* row = rows + (i - first) * p.row + column;
    Floats total[K];
    for (int k = 0; k < K; ++k) {
      total[k] = p.compatibility == nullptr ? get(p.logits + i * p.row + column + k * kChunk) : Floats{};
    }
    for (int n = 0; n < p.kernels; ++n) {
      Floats sum[K] = {};
      slice_pixel<float, K>(p.kernel[n].lattice, table[n], i, sum);
      const float factor = p.kernel[n].factor[i];
      for (int k = 0; k < K; ++k) total[k] += factor * sum[k];
    }
    for (int k = 0; k < K; ++k) put(row + k * kChunk, total[k]);
  }
}

}  // namespace

void lattice_simplices(const SimplexParams& p, int64_t begin, int64_t end, uint64_t* keys, bool* valid) {
  switch (p.dims) {
    case 1:
      return simplices<1>(p, begin, end, keys, valid);
    case 2:
      return simplices<2>(p, begin, end, keys, valid);
    case 3:
      return simplices<3>(p, begin, end, keys, valid);
    case 4:
      return simplices<4>(p, begin, end, keys, valid);
    case 5:
      return simplices<5>(p, begin, end, keys, valid);
    default:
      return simplices<6>(p, begin, end, keys, valid);
  }
}

void lattice_splat(Kind kind, const SplatParams& p, int64_t begin, int64_t end) {
  with_width(p.chunks, [&](auto width) {
    if (kind == Kind::f64) {
      splat<double, decltype(width)::value>(p, begin, end);
    } else {
      splat<float, decltype(width)::value>(p, begin, end);
    }
  });
}

void lattice_blur(Kind kind, const BlurParams& p, int64_t begin, int64_t end) {
  with_width(p.chunks, [&](auto width) {
    if (kind == Kind::f64) {
      blur<double, decltype(width)::value>(p, begin, end);
    } else {
      blur<float, decltype(width)::value>(p, begin, end);
    }
  });
}

void lattice_gather(const GatherParams& p, int64_t begin, int64_t end) {
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    for (int64_t block = begin; block < end; ++block) {
      if (p.log || p.negate) {  // logits, in float32
        gather<T, float>(p, block);
      } else {
        gather<T, Sum<T>>(p, block);
      }
    }
  });
}

void lattice_slice(const SliceParams& p, int64_t begin, int64_t end) {
  with_type(p.kind, [&](auto type) {
    with_width(p.chunks, [&](auto width) { slice<decltype(type), decltype(width)::value>(p, begin, end); });
  });
}

void field_step(const FieldParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t chunks = p.row / kChunk, tiles = tiles_for(chunks);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kPixelBlock;
    const int64_t count = p.pixels - first < kPixelBlock ? p.pixels - first : kPixelBlock;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = tile_begin(tile, chunks);
      with_width(tile_begin(tile + 1, chunks) - column, [&](auto width) {
        slice_tile<decltype(width)::value>(p, column * kChunk, first, count, scratch);
      });
    }
    if (p.compatibility != nullptr) {
      mix_classes(p, p.logits + first * p.row, scratch, count, scratch + kPixelBlock * p.row);
    }
    for (int64_t i = 0; i < count; ++i) softmax_row(scratch + i * p.row, p.row);
    if (p.rows == nullptr) {
      write_planes<float>(scratch, p.row, p.channels, p.index, p.order + first, count, p.pixels, p.planes);
    } else {
      for (int64_t c = 0; c < count * p.row; c += kChunk) put(p.rows + first * p.row + c, get(scratch + c));
    }
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
