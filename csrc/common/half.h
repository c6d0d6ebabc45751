// float16 and bfloat16 for the performance-critical CPU files: widened to float, and rounded to nearest even,
// by integer operations on vectors, so that tensors of these types need no float copy at any SIMD level.
// Include only from files compiled per SIMD level.
#pragma once

#include "common/geometry.h"
#include "common/vec.h"

namespace afa {
namespace AFA_SIMD {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Accumulation type.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;
template <typename T>
using SumVec = typename Vec<Sum<T>>::type;

typedef uint32_t Words __attribute__((vector_size(AFA_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(AFA_VECTOR_BYTES / 2)));

inline SumVec<float> as_floats(Words words) {
  SumVec<float> v;
  __builtin_memcpy(&v, &words, sizeof v);
  return v;
}
inline Words as_words(SumVec<float> v) {
  Words words;
  __builtin_memcpy(&words, &v, sizeof words);
  return words;
}

inline SumVec<float> widened(BFloat16, Words bits) {
  return as_floats(bits << 16);
}
// The exponent bias changes from 15 to 127; infinities and NaN keep an exponent of all ones; subnormals are
// converted by a float subtraction, as they have no leading one.
inline SumVec<float> widened(Half, Words bits) {
  const Words magnitude = (bits & 0x7fff) << 13;
  const Words exponent = magnitude & 0x0f800000;
  Words moved = magnitude + (112u << 23);
  moved = exponent == 0x0f800000 ? moved + (112u << 23) : moved;
  const Words subnormal = as_words(as_floats(moved + (1u << 23)) - as_floats(Words{} + (113u << 23)));
  return as_floats((exponent == 0 ? subnormal : moved) | ((bits & 0x8000) << 16));
}

inline Words narrowed(BFloat16, SumVec<float> v) {
  const Words words = as_words(v);
  const Words nearest = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  return (words & 0x7fffffff) > 0x7f800000 ? (words >> 16) | 0x40 : nearest;
}
inline Words narrowed(Half, SumVec<float> v) {
  const Words words = as_words(v);
  const Words magnitude = words & 0x7fffffff;
  const Words nearest = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal's bits, rounded, at the end of the mantissa.
  const Words subnormal = as_words(as_floats(magnitude) + 0.5f) - 0x3f000000;
  Words result = magnitude < 0x38800000 ? subnormal : nearest;
  result = magnitude >= 0x47800000 ? Words{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Words{} + 0x7e00 : result;
  return result | ((words >> 16) & 0x8000);
}

// One vector of T, converted to the accumulation type.
inline SumVec<float> load_wide(const float* p) {
  return load<float>(p);
}
inline SumVec<double> load_wide(const double* p) {
  return load<double>(p);
}
template <typename T>
inline SumVec<float> load_wide(const T* p) {
  HalfWords bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return widened(T{}, __builtin_convertvector(bits, Words));
}

inline void store_narrow(float* p, SumVec<float> v) {
  store<float>(p, v);
}
inline void store_narrow(double* p, SumVec<double> v) {
  store<double>(p, v);
}
template <typename T>
inline void store_narrow(T* p, SumVec<float> v) {
  const HalfWords bits = __builtin_convertvector(narrowed(T{}, v), HalfWords);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Only the first `count` lanes; the others are 0.
template <typename T>
inline SumVec<T> load_wide_first(const T* p, int64_t count) {
  if (count >= kLanes<Sum<T>>) return load_wide(p);
  T lanes[kLanes<Sum<T>>] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load_wide(lanes);
}
template <typename T>
inline void store_narrow_first(T* p, SumVec<T> v, int64_t count) {
  if (count >= kLanes<Sum<T>>) return store_narrow(p, v);
  T lanes[kLanes<Sum<T>>];
  store_narrow(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
inline Sum<T> widen_one(const T* p) {
  return load_wide_first(p, 1)[0];
}
inline float widen_one(const float* p) {
  return *p;
}
inline double widen_one(const double* p) {
  return *p;
}

// Calls f with a value of the type of `kind`.
template <typename F>
inline void with_type(Kind kind, const F& f) {
  switch (kind) {
    case Kind::f32:
      f(float{});
      break;
    case Kind::f64:
      f(double{});
      break;
    case Kind::f16:
      f(Half{});
      break;
    case Kind::bf16:
      f(BFloat16{});
      break;
  }
}

}  // namespace
}  // namespace AFA_SIMD
}  // namespace afa
