// Common code of the kernels that repeat a stencil.
#pragma once

#include "common/cuda.cuh"
#include "stencil/stencil.h"

namespace afa {
namespace {

// The planes that step t reads and writes.
__device__ inline const void* source_of(const StencilParams& p, int t) {
  return t == 0 ? p.in.data : p.spare[(t - 1) % 2];
}
__device__ inline void* result_of(const StencilParams& p, int t) {
  return t + 1 == p.steps ? p.out.data : p.spare[t % 2];
}

__device__ inline bool is_active(const StencilParams& p, int64_t b, int64_t c) {
  return p.class_mask == nullptr || p.class_mask[b * p.classes + c];
}

__device__ inline int clamped(int i, int size) {
  return i < 0 ? 0 : i >= size ? size - 1 : i;
}

}  // namespace
}  // namespace afa
