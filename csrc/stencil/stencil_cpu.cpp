// The stencil on the CPU; compiled once per SIMD level.
//
// A tile is a few vectors of one row. Its weights (48 * 256 bytes for PAR with AVX-512) stay in the
// first-level cache while the classes pass in blocks of four, so that a weight is loaded once for four sums
// held in registers: 1.25 loads a multiply-add, the limit of this kernel. The planes carry replicated columns
// on both sides, which leaves no border case in the loops; a row that is no multiple of the vector's length
// ends with an overlapping vector, and only rows shorter than one vector take the path by elements. Every
// pixel is the same sequence of operations whatever the tile or thread, so results don't depend on the number
// of threads.
#include "common/vec.h"
#include "stencil/stencil.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int kClassBlock = 4;

template <typename T>
inline T* row_of(const Planes& planes, int64_t plane, int64_t y) {
  return static_cast<T*>(planes.data) + plane * planes.plane_stride + y * planes.row_stride;
}

// `weights` and the sources point at (row, x) of the tile; `offset(k)` is shared by all classes.
template <typename T, int CLASSES, int VECTORS, bool PARTIAL>
inline void tile(const StencilParams& p, int64_t y, const T* weights, const T* const* source,
                 T* const* target, int64_t count) {
  using V = typename Vec<T>::type;
  V sum[CLASSES][VECTORS] = {};
  for (int r = 0; r < p.stencil.runs; ++r) {
    const Run& run = p.stencil.run[r];
    const int64_t row = clamp_index(y + run.dy, p.height) * p.in.row_stride;
    for (int j = 0; j < run.count; ++j) {
      const int64_t offset = row + clip_offset(run.dx + int64_t{j} * run.step, p.in.pad);
      V weight[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        weight[v] = PARTIAL ? load_first<T>(weights, count) : load<T>(weights + v * kLanes<T>);
      }
      for (int c = 0; c < CLASSES; ++c) {
        for (int v = 0; v < VECTORS; ++v)
          sum[c][v] += weight[v] * load<T>(source[c] + offset + v * kLanes<T>);
      }
      weights += p.weight_stride_k;
    }
  }
  for (int c = 0; c < CLASSES; ++c) {
    for (int v = 0; v < VECTORS; ++v) {
      if (PARTIAL) {
        store_first<T>(target[c], sum[c][v], count);
      } else {
        store<T>(target[c] + v * kLanes<T>, sum[c][v]);
      }
    }
  }
}

template <typename T, int VECTORS, bool PARTIAL>
inline void classes_of_tile(const StencilParams& p, int64_t b, int64_t y, int64_t x, int64_t count) {
  const T* weights = static_cast<const T*>(p.weights) + b * p.weight_stride_b + y * p.weight_stride_y + x;
  const T* source[kClassBlock];
  T* target[kClassBlock];
  const int64_t end = p.active_begin[b + 1];
  for (int64_t i = p.active_begin[b]; i < end; i += kClassBlock) {
    const int64_t block = end - i < kClassBlock ? end - i : kClassBlock;
    for (int64_t c = 0; c < block; ++c) {
      source[c] = row_of<T>(p.in, p.active[i + c], 0) + x;
      target[c] = row_of<T>(p.out, p.active[i + c], y) + x;
    }
    switch (block) {
      case 1:
        tile<T, 1, VECTORS, PARTIAL>(p, y, weights, source, target, count);
        break;
      case 2:
        tile<T, 2, VECTORS, PARTIAL>(p, y, weights, source, target, count);
        break;
      case 3:
        tile<T, 3, VECTORS, PARTIAL>(p, y, weights, source, target, count);
        break;
      default:
        tile<T, kClassBlock, VECTORS, PARTIAL>(p, y, weights, source, target, count);
    }
  }
}

template <typename T>
void replicate_border(const Planes& planes, int64_t plane, int64_t y, int64_t width) {
  T* row = row_of<T>(planes, plane, y);
  for (int64_t i = 1; i <= planes.pad; ++i) {
    row[-i] = row[0];
    row[width - 1 + i] = row[width - 1];
  }
}

template <typename T>
void step_rows(const StencilParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kWide = AFA_VECTORS_PER_TILE * kLanes<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    if (p.width < kLanes<T>) {
      classes_of_tile<T, 1, true>(p, b, y, 0, p.width);
    } else {
      int64_t x = 0;
      for (; x + kWide <= p.width; x += kWide) classes_of_tile<T, AFA_VECTORS_PER_TILE, false>(p, b, y, x, 0);
      for (; x < p.width; x += kLanes<T>) {
        const int64_t last = p.width - kLanes<T>;
        classes_of_tile<T, 1, false>(p, b, y, x < last ? x : last, 0);
      }
    }
    for (int64_t i = p.active_begin[b]; i < p.active_begin[b + 1]; ++i) {
      replicate_border<T>(p.out, p.active[i], y, p.width);
    }
  }
}

// Row y of the adjoint gathers from every row that step reads row y from: one row inside, several at the
// borders. Sums run over x beyond both ends; what lies there belongs to the border columns.
template <typename T>
void adjoint_rows(const StencilParams& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t reach = p.stencil.reach_x < p.width ? p.stencil.reach_x : p.width - 1;
  const int64_t length = p.width + 2 * reach;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    for (int64_t i = p.active_begin[b]; i < p.active_begin[b + 1]; i += kClassBlock) {
      const int64_t left = p.active_begin[b + 1] - i;
      const int64_t block = left < kClassBlock ? left : kClassBlock;
      for (int64_t n = 0; n < block * length; ++n) scratch[n] = 0;
      const T* plane_weights = static_cast<const T*>(p.weights) + b * p.weight_stride_b;
      for (int r = 0; r < p.stencil.runs; ++r) {
        const Run& run = p.stencil.run[r];
        const Range rows = clamp_preimage(y, run.dy, p.height);
        for (int j = 0; j < run.count; ++j, plane_weights += p.weight_stride_k) {
          const int64_t dx = clip_offset(run.dx + int64_t{j} * run.step, reach);
          for (int64_t from = rows.begin; from < rows.end; ++from) {
            const T* weights = plane_weights + from * p.weight_stride_y;
            for (int64_t c = 0; c < block; ++c) {
              const T* grad = row_of<T>(p.in, p.active[i + c], from);
              T* sum = scratch + c * length + reach + dx;
#pragma GCC ivdep
              for (int64_t x = 0; x < p.width; ++x) sum[x] += weights[x] * grad[x];
            }
          }
        }
      }
      for (int64_t c = 0; c < block; ++c) {
        T* sum = scratch + c * length + reach;
        for (int64_t n = 1; n <= reach; ++n) {
          sum[0] += sum[-n];
          sum[p.width - 1] += sum[p.width - 1 + n];
        }
        T* out = row_of<T>(p.out, p.active[i + c], y);
        for (int64_t x = 0; x < p.width; ++x) out[x] = sum[x];
      }
    }
  }
}

template <typename T>
void weight_grad_rows(const StencilParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    T* target = static_cast<T*>(p.grad_weights) + (b * p.stencil.size * p.height + y) * p.width;
    for (int r = 0; r < p.stencil.runs; ++r) {
      const Run& run = p.stencil.run[r];
      const int64_t from = clamp_index(y + run.dy, p.height);
      for (int j = 0; j < run.count; ++j, target += p.height * p.width) {
        const int64_t dx = clip_offset(run.dx + int64_t{j} * run.step, p.in.pad);
        for (int64_t i = p.active_begin[b]; i < p.active_begin[b + 1]; ++i) {
          const T* source = row_of<T>(p.in, p.active[i], from) + dx;
          const T* grad = row_of<T>(p.out, p.active[i], y);
#pragma GCC ivdep
          for (int64_t x = 0; x < p.width; ++x) target[x] += grad[x] * source[x];
        }
      }
    }
  }
}

}  // namespace

void stencil_step(const StencilParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    step_rows<double>(p, begin, end);
  } else {
    step_rows<float>(p, begin, end);
  }
}

void stencil_adjoint(const StencilParams& p, int64_t begin, int64_t end, void* scratch) {
  if (p.kind == Kind::f64) {
    adjoint_rows<double>(p, begin, end, static_cast<double*>(scratch));
  } else {
    adjoint_rows<float>(p, begin, end, static_cast<float*>(scratch));
  }
}

void stencil_weight_grad(const StencilParams& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::f64) {
    weight_grad_rows<double>(p, begin, end);
  } else {
    weight_grad_rows<float>(p, begin, end);
  }
}

}  // namespace AFA_SIMD
}  // namespace afa
