// The permutohedral lattice of "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Adams, Baek
// and Davis 2010): the buffer that holds one, shared by both devices, and the keys of its vertices.
//
// Each pixel lies in a simplex with dims + 1 corners. Filtering splats pixels onto the vertices, blurs along
// dims + 1 axes, and slices back. A lattice is built once per image and kept in one int32 buffer, whose parts
// differ between the devices. Sums have one order on each device: there are no atomics, and results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"

namespace afa {

constexpr int kMaxFeatures = 6;
constexpr int64_t kLatticeHeader = 16;  // words; the first is the number of vertices
constexpr int64_t kRun = 32;            // entries that CUDA's splat sums in order

// Pixel factors of the filter: 1 / sqrt(norm) on both sides, or 1 / norm on one.
enum class Normalize : int32_t { none, symmetric, before, after };

// Offsets of the buffer's parts, in words. There are at most pixels * (dims + 1) vertices; parts that depend
// on their number have room for that many, but only what is needed is touched.
struct LatticeLayout {
  int64_t pixels = 0, dims = 0;
  AFA_HOST_DEVICE int64_t corners() const { return dims + 1; }
  AFA_HOST_DEVICE int64_t entries() const { return pixels * corners(); }
  AFA_HOST_DEVICE int64_t weight() const { return kLatticeHeader; }      // [N, E] float, of a pixel's corners
  AFA_HOST_DEVICE int64_t norm() const { return weight() + entries(); }  // [N] float: filtered ones
  AFA_HOST_DEVICE int64_t offset() const { return norm() + pixels; }  // [N, E] vertices of a pixel's corners
  AFA_HOST_DEVICE int64_t pixel() const { return offset() + entries(); }  // [N * E], sorted by vertex
  AFA_HOST_DEVICE int64_t share() const { return pixel() + entries(); }   // [N * E] float, weights
  AFA_HOST_DEVICE int64_t first() const { return share() + entries(); }   // [runs] vertices of their first
  AFA_HOST_DEVICE int64_t runs() const { return (entries() + kRun - 1) / kRun; }
  AFA_HOST_DEVICE int64_t neighbor() const { return first() + runs(); }  // [E, V, 2]; V: none
  // The CPU's parts (lattice_cpu.h) of a lattice without pixels need 2 words more than CUDA's.
  AFA_HOST_DEVICE int64_t words() const { return neighbor() + 2 * corners() * entries() + 2; }
};

namespace {  // one copy for each file: see geometry.h

// A vertex's key in 64 bits: its remainder in the low 3, then its dims coordinates divided by dims + 1, each
// with a bias.
AFA_HOST_DEVICE inline int key_bits(int64_t dims) {
  const int64_t bits = 60 / dims;
  return static_cast<int>(bits < 21 ? bits : 21);
}
AFA_HOST_DEVICE inline int64_t key_bias(int64_t dims) {
  return int64_t{1} << (key_bits(dims) - 1);
}
// Divided coordinates stay below this, so that neighbors' coordinates fit into their bits, too.
AFA_HOST_DEVICE inline int64_t key_limit(int64_t dims) {
  return key_bias(dims) - 4;
}
AFA_HOST_DEVICE inline uint64_t key_unit(int64_t dims, int64_t axis) {
  return axis < dims ? uint64_t{1} << (3 + axis * key_bits(dims)) : 0;
}
// The neighbor along an axis: dims added to that coordinate, 1 taken from all others.
AFA_HOST_DEVICE inline uint64_t key_neighbor(uint64_t key, int64_t dims, int64_t axis) {
  const uint64_t up = key_unit(dims, axis);
  if ((key & 7) != 0) return key - 1 + up;
  uint64_t all = 0;
  for (int64_t i = 0; i < dims; ++i) all += key_unit(dims, i);
  return key + static_cast<uint64_t>(dims) - all + up;
}
// The neighbor in the other direction.
AFA_HOST_DEVICE inline uint64_t key_neighbor_below(uint64_t key, int64_t dims, int64_t axis) {
  const uint64_t up = key_unit(dims, axis);
  if ((key & 7) != static_cast<uint64_t>(dims)) return key + 1 - up;
  uint64_t all = 0;
  for (int64_t i = 0; i < dims; ++i) all += key_unit(dims, i);
  return key - static_cast<uint64_t>(dims) + all - up;
}
AFA_HOST_DEVICE inline uint64_t key_hash(uint64_t key) {
  key ^= key >> 32;
  key *= 0x9e3779b97f4a7c15u;
  return key ^ (key >> 29);
}

// Factor of the filter's sums, as in pydensecrf, for the gain of the blurs.
AFA_HOST_DEVICE inline float lattice_gain(int64_t dims) {
  return 1.0f / (1.0f + 1.0f / static_cast<float>(int64_t{1} << dims));
}

}  // namespace
}  // namespace afa
