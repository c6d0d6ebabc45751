// Vectors of up to 16 bytes in device code, each moved in one access, and checks of their alignment.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda.cuh"

namespace afa {
namespace {

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T at[V];
};

// Integers of a vector's size, which the compiler moves in one access for all value types.
template <int kBytes>
struct Raw;
template <>
struct Raw<1> {
  using type = uint8_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

template <int V, typename T>
__device__ inline Vec<T, V> load(const T* from) {
  using Bits = typename Raw<sizeof(T) * V>::type;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  Vec<T, V> v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

template <int V, typename T>
__device__ inline Vec<T, V> load_if(bool in, const T* from) {
  Vec<T, V> v = {};
  if (in) v = load<V>(from);
  return v;
}

template <typename T, int V>
__device__ inline void store(T* to, const Vec<T, V>& v) {
  using Bits = typename Raw<sizeof(T) * V>::type;
  Bits bits;
  memcpy(&bits, &v, sizeof(v));
  *reinterpret_cast<Bits*>(to) = bits;
}

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // values in 16 bytes

bool aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace
}  // namespace afa
