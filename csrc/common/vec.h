// Short vectors for the performance-critical CPU files, with the compiler's vector extension: one source for
// SSE2, AVX2, AVX-512 and Arm. Include only from files compiled per SIMD level (AFA_SIMD is the level's
// namespace).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define AFA_VECTOR_BYTES 64
#define AFA_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define AFA_VECTOR_BYTES 32
#define AFA_VECTOR_REGISTERS 16
#else
#define AFA_VECTOR_BYTES 16
#define AFA_VECTOR_REGISTERS 16
#endif

namespace afa {
namespace AFA_SIMD {
namespace {

template <typename T>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(AFA_VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(AFA_VECTOR_BYTES)));
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(AFA_VECTOR_BYTES)));
  typedef int64_t ints __attribute__((vector_size(AFA_VECTOR_BYTES)));
};

template <typename T>
constexpr int kLanes = AFA_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
inline typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, typename Vec<T>::type v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` lanes; the others are 0.
template <typename T>
inline typename Vec<T>::type load_first(const T* p, int64_t count) {
  typename Vec<T>::type v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <typename T>
inline void store_first(T* p, typename Vec<T>::type v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// The larger value of each lane; b if either is NaN. The compiler generates two instructions for the
// comparison, not one.
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
inline Vec<float>::type larger(Vec<float>::type a, Vec<float>::type b) {
  return (Vec<float>::type)_mm512_maskz_max_ps(0xffff, (__m512)a,
                                               (__m512)b);  // without masks: gcc 12 warns about its intrinsic
}
#elif defined(__AVX2__)
inline Vec<float>::type larger(Vec<float>::type a, Vec<float>::type b) {
  return (Vec<float>::type)_mm256_max_ps((__m256)a, (__m256)b);
}
#endif

// exp(x) for x <= 0, clamped to exp(-87) below -87; NaN stays NaN. Relative error below 2e-7 (range reduction
// by ln 2 in two parts, then a degree-6 Taylor polynomial on |r| <= ln(2)/2 with a remainder below 1.2e-7).
inline typename Vec<float>::type exp_nonpositive(typename Vec<float>::type x) {
  using V = typename Vec<float>::type;
  // Adding 1.5 * 2^23 rounds to an integer n in the low bits; n + 127 is the exponent of a float.
  constexpr float kRound = 12582912.0f + 127;
  x = larger(V{} - 87.0f, x);  // in this order, so that a NaN passes
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  typename Vec<float>::ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  V scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline typename Vec<double>::type exp_nonpositive(typename Vec<double>::type x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// Uses an array, because the compiler turns a loop over memory into one instruction, but not a loop over a
// vector's lanes.
inline typename Vec<float>::type square_root(typename Vec<float>::type x) {
  float lanes[kLanes<float>];
  store<float>(lanes, x);
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load<float>(lanes);
}

inline typename Vec<double>::type square_root(typename Vec<double>::type x) {
  double lanes[kLanes<double>];
  store<double>(lanes, x);
  for (int i = 0; i < kLanes<double>; ++i) lanes[i] = __builtin_sqrt(lanes[i]);
  return load<double>(lanes);
}

}  // namespace
}  // namespace AFA_SIMD
}  // namespace afa
