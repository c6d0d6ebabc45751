// Vectors in device code, moved by accesses of 16 bytes, or by one where they are smaller; and whether an
// address allows them. The compiler does not generate such accesses for a structure.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda.cuh"

namespace afa {
namespace {

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
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

// A structure of 1, 2, 4 or 8 bytes, or of a multiple of 16, from an address that is a multiple of its size,
// or of 16 bytes.
template <typename S>
__device__ inline S load_as(const void* from) {
  S value;
  if constexpr (sizeof(S) <= 16) {
    const auto bits = *static_cast<const typename Raw<sizeof(S)>::type*>(from);
    memcpy(&value, &bits, sizeof(value));
  } else {
    uint4 bits[sizeof(S) / 16];
    for (int n = 0; n < static_cast<int>(sizeof(S) / 16); ++n) bits[n] = static_cast<const uint4*>(from)[n];
    memcpy(&value, bits, sizeof(value));
  }
  return value;
}

template <typename S>
__device__ inline void store_as(void* to, const S& value) {
  if constexpr (sizeof(S) <= 16) {
    typename Raw<sizeof(S)>::type bits;
    memcpy(&bits, &value, sizeof(value));
    *static_cast<decltype(bits)*>(to) = bits;
  } else {
    uint4 bits[sizeof(S) / 16];
    memcpy(bits, &value, sizeof(value));
    for (int n = 0; n < static_cast<int>(sizeof(S) / 16); ++n) static_cast<uint4*>(to)[n] = bits[n];
  }
}

template <int V, typename T>
__device__ inline Vec<T, V> load(const T* from) {
  return load_as<Vec<T, V>>(from);
}

template <int V, typename T>
__device__ inline Vec<T, V> load_if(bool in, const T* from) {
  Vec<T, V> v = {};
  if (in) v = load<V>(from);
  return v;
}

template <typename T, int V>
__device__ inline void store(T* to, const Vec<T, V>& v) {
  store_as(to, v);
}

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // values in 16 bytes

AFA_HOST_DEVICE inline bool aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace
}  // namespace afa
