// Vectors of 8 channels for the lattice's CPU files, and the exchange between planes [channels, N] and rows
// of channels. Include only from files compiled per SIMD level.
#pragma once

#include "common/half.h"
#include "common/vec.h"
#include "crf/lattice_cpu.h"

// Chunks are wider than the registers of some levels. Functions that take or return them are in one file
// each.
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
// The larger of each lane; b if either is NaN.
inline Floats upper(const Floats& a, const Floats& b) {
#if defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
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

// log(x) for normal x > 0: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), log(m) by a degree-9 polynomial in
// m - 1 (coefficients of Cephes). Relative error below 2e-7. Infinity and NaN are returned.
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
  const Floats log =
      ((p * m * square + exponent * -2.12194440e-4f) - 0.5f * square + m) + exponent * 0.693359375f;
  return x < __builtin_inff() ? log : x;
}

// As exp_nonpositive in vec.h, on a chunk.
inline Floats exponential(Floats x) {
  constexpr float kRound = 12582912.0f + 127;
  x = upper(Floats{} - 87.0f, x);  // in this order, so that a NaN passes
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

// Whether these are the numbers of a whole chunk of consecutive pixels.
inline bool is_run(const int32_t* order, int64_t count) {
  return count >= kChunk && order[kChunk - 1] - order[0] == kChunk - 1;
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
  return logarithm(upper(Floats{} + 1e-5f, v));
}
inline Doubles log_chunk(const Doubles& v) {
  return __builtin_convertvector(log_chunk(__builtin_convertvector(v, Floats)), Doubles);
}

// Rows [count, stride], of the type Out, of the pixels from `first` on.
template <typename T, typename Out>
void gather_rows(const GatherParams& p, int64_t first, int64_t count, Out* rows) {
  using S = Sum<T>;
  const T* planes = static_cast<const T*>(p.planes);
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t later = first + i + 2 * kPixelBlock;
    const int32_t* const ahead = later < p.pixels ? p.order + later : nullptr;
    for (int64_t c = 0; c < p.chunks * kChunk; c += kChunk) {
      Chunk<Out> tile[kChunk];
      for (int64_t k = 0; k < kChunk; ++k) {
        if (c + k >= p.channels) {
          tile[k] = Chunk<Out>{} + static_cast<Out>(p.padding);
          continue;
        }
        const int64_t plane = p.index == nullptr ? c + k : p.index[c + k];
        if (ahead != nullptr) __builtin_prefetch(planes + plane * p.pixels + *ahead);
        Chunk<S> v = widen_chunk(planes + plane * p.pixels, p.order + first + i, count - i);
        if (p.log) v = log_chunk(v);
        if (p.negate) v = -v;
        tile[k] = __builtin_convertvector(v, Chunk<Out>);
      }
      transpose<Out>(tile);
      for (int64_t k = 0; k < kChunk && i + k < count; ++k) put(rows + (i + k) * p.stride + c, tile[k]);
    }
  }
}

// The reverse. Rows up to the end of the last chunk of pixels must be readable.
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

}  // namespace
}  // namespace AFA_SIMD
}  // namespace afa
