// Host code that the operators on a lattice share: checks, the order of pixels, and the filter's steps.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "crf/lattice_cpu.h"
#include "crf/lattice_cuda.h"

namespace afa {

template <typename T>
T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}

Normalize normalize_of(const std::string& name);

// `name` is the lattice's in the error. Its batch is that of the values, or 1 for all images.
void check_lattice(const Tensor& lattice, const char* name, const LatticeLayout& layout, const Tensor& values,
                   const char* values_name);
// The buffer of an image.
const int32_t* image_lattice(const Tensor& lattice, int64_t image, const LatticeLayout& layout);

// ---- CPU ----

// See kTileWidth.
std::vector<int32_t> pixel_order(int64_t height, int64_t width);

// 1 / sqrt(norm) or 1 / norm, times `scale`; or `scale`.
std::vector<float> pixel_factors(const CpuLattice& lattice, Normalize normalize, bool before, float scale);

// Merges the blocks' rows into the table, and blurs it along all axes.
void merge_and_blur(Kind kind, const MergeParams& merge, bool reverse);

// ---- CUDA ----

constexpr int64_t kTableWidth = 32;  // channels filtered at a time, which limits the size of the tables

// The channels of a vector: 4, or 2 or 1 where 4 would pad a row by more than a seventh.
int64_t vector_for(Kind kind, int64_t channels);
inline int64_t padded(int64_t channels, int64_t vector) {
  return (channels + vector - 1) / vector * vector;
}

// Two tables for a lattice's vertices, of which there may be one per corner of each pixel.
struct CudaTables {
  Tensor first, second;
  CudaTables(const LatticeLayout& layout, int64_t row, const Tensor& like, ScalarType type);
};

// Splats the rows `in` of each step, and blurs, in tables [N * E, width] of the last lattice. Then `in` is
// what to slice to `out`.
void splat_and_blur_on_cuda(const char* op, LatticeStepsParams& steps, void* first, void* second,
                            bool reverse, void* stream);

}  // namespace afa
