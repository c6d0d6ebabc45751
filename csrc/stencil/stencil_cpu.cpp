// The stencil on the CPU; compiled once per SIMD level.
//
// A tile is up to four vectors of one row. Its classes are processed in blocks of up to six or seven, whose
// sums stay in registers, so that a weight is loaded once per block; the tile's weights stay in the L1 cache
// for all blocks. The planes have replicated columns on both sides, so the loops have no border cases. If a
// row's length is not a multiple of the vector length, its last vector overlaps the previous one; only rows
// shorter than one vector are processed by element. Every pixel is computed by the same sequence of
// operations in any tile or thread, so results don't depend on the number of threads.
//
// Loads are the bottleneck: one per multiply-add, and most of them cross a cache line and so count twice.
// From the L1 cache, the core that it was tuned on (AVX-512) reaches 42e9 multiply-adds per second, and 60e9
// without such crossings; benchmarks/par_kernel.py measures this limit on the current machine. PAR's six
// dilations read 13 rows per class, from the L2 cache: 26e9 at 64x64 with 21 classes. Larger masks reach
// about 20e9. With three classes or fewer the limit is reading the weights, 4 bytes for one multiply-add per
// class. Not faster: weights packed by row or by tile (within 5%), copied for each tile, or prefetched
// explicitly; wider tiles with fewer classes. Aligned loads with permutes gain 12% if the data is in the L1
// cache, which is not the usual case.
#include "common/vec.h"
#include "stencil/stencil.h"

namespace afa {
namespace AFA_SIMD {
namespace {

constexpr int kClassBlock = AFA_VECTOR_REGISTERS == 32 ? 7 : 6;
constexpr int kAdjointBlock = 4;

// An active plane: its row 0 and its row stride.
template <typename T>
struct Plane {
  T* first;
  int64_t row_stride;

  T* row(int64_t y) const { return first + y * row_stride; }
};

// The i-th active plane, which belongs to image b.
template <typename T>
inline Plane<T> plane_of(const StencilParams& p, const Planes& planes, int64_t b, int64_t i) {
  T* data = static_cast<T*>(planes.data);
  if (!planes.by_row) return {data + p.active[i] * planes.plane_stride, planes.row_stride};
  const int64_t before = p.active_begin[b], count = p.active_begin[b + 1] - before;
  return {data + (before * p.height + i - before) * planes.plane_stride, count * planes.plane_stride};
}

// The widest tile: sums use at most 7/8 of the registers.
constexpr int most_vectors(int classes) {
  return AFA_VECTOR_REGISTERS * 7 / 8 / classes < 4 ? AFA_VECTOR_REGISTERS * 7 / 8 / classes : 4;
}

// A tile for the inner loop: `weights` and `source` (class 0 of the block, row 0) point to the tile's x.
template <typename T>
struct Tile {
  const T* weights;
  int64_t weight_stride;
  const int64_t* offsets;  // of the neighbors, from x in row 0
  int size;
  const T* source;
  int64_t class_stride;
  T* target[kClassBlock];
  int64_t count;  // number of pixels if less than a vector
};

template <typename T, int CLASSES, int VECTORS, bool PARTIAL>
void sum_tile(const Tile<T>& t) {
  using V = typename Vec<T>::type;
  V sum[CLASSES][VECTORS] = {};
  const T* weights = t.weights;
  for (int k = 0; k < t.size; ++k, weights += t.weight_stride) {
    V weight[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      weight[v] = PARTIAL ? load_first<T>(weights, t.count) : load<T>(weights + v * kLanes<T>);
    }
    const T* source = t.source + t.offsets[k];
    for (int c = 0; c < CLASSES; ++c, source += t.class_stride) {
      for (int v = 0; v < VECTORS; ++v) sum[c][v] += weight[v] * load<T>(source + v * kLanes<T>);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < CLASSES; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      if (PARTIAL) {
        store_first<T>(t.target[c], sum[c][v], t.count);
      } else {
        store<T>(t.target[c] + v * kLanes<T>, sum[c][v]);
      }
    }
  }
}

template <typename T, int CLASSES, int VECTORS = most_vectors(CLASSES)>
inline void sum_vectors(const Tile<T>& t, int64_t vectors) {
  if (vectors == VECTORS) return sum_tile<T, CLASSES, VECTORS, false>(t);
  if constexpr (VECTORS > 1) sum_vectors<T, CLASSES, VECTORS - 1>(t, vectors);
}

template <typename T, int CLASSES = kClassBlock>
inline void sum_classes(const Tile<T>& t, int64_t classes, int64_t vectors) {
  if (classes == CLASSES) {
    if (vectors == 0) return sum_tile<T, CLASSES, 1, true>(t);
    return sum_vectors<T, CLASSES>(t, vectors);
  }
  if constexpr (CLASSES > 1) sum_classes<T, CLASSES - 1>(t, classes, vectors);
}

// A tile of `vectors` whole vectors from x, or of the whole row (0 vectors) if it is shorter than a vector.
template <typename T>
inline void tile_of_all_classes(const StencilParams& p, int64_t b, int64_t y, int64_t x, int64_t vectors,
                                const int64_t* offsets) {
  Tile<T> t;
  t.weights = static_cast<const T*>(p.weights) + b * p.weight_stride_b + y * p.weight_stride_y + x;
  t.weight_stride = p.weight_stride_k;
  t.offsets = offsets;
  t.size = p.stencil.size;
  t.class_stride = p.in.plane_stride;
  t.count = p.width;
  const int64_t end = p.active_begin[b + 1];
  int64_t i = p.active_begin[b];
  for (int64_t blocks = (end - i + kClassBlock - 1) / kClassBlock; blocks > 0; --blocks) {
    const int64_t classes = (end - i + blocks - 1) / blocks;
    t.source = plane_of<const T>(p, p.in, b, i).first + x;
    for (int64_t c = 0; c < classes; ++c) t.target[c] = plane_of<T>(p, p.out, b, i + c).row(y) + x;
    sum_classes<T>(t, classes, vectors);
    i += classes;
  }
}

template <typename T>
inline void replicate_border(T* row, int64_t pad, int64_t width) {
  for (int64_t i = 1; i <= pad; ++i) {
    row[-i] = row[0];
    row[width - 1 + i] = row[width - 1];
  }
}

template <typename T>
void step_rows(const StencilParams& p, int64_t begin, int64_t end, int64_t* offsets) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t item = p.upwards ? begin + end - 1 - n : n;
    const int64_t b = item / p.height, y = item % p.height;
    const int64_t classes = p.active_begin[b + 1] - p.active_begin[b];
    if (classes == 0) continue;
    const int64_t row_stride = classes * p.in.plane_stride;
    int64_t* offset = offsets;
    for (int r = 0; r < p.stencil.runs; ++r) {
      const Run& run = p.stencil.run[r];
      const int64_t row = clamp_index(y + run.dy, p.height) * row_stride;
      for (int j = 0; j < run.count; ++j) {
        *offset++ = row + clip_offset(run.dx + int64_t{j} * run.step, p.in.pad);
      }
    }
    const int64_t vectors = p.width / kLanes<T>;
    if (vectors == 0) {
      tile_of_all_classes<T>(p, b, y, 0, 0, offsets);
    } else {
      const int64_t blocks = (classes + kClassBlock - 1) / kClassBlock;
      const int64_t most = most_vectors(static_cast<int>((classes + blocks - 1) / blocks));
      int64_t x = 0;
      for (int64_t tiles = (vectors + most - 1) / most; tiles > 0; --tiles) {
        const int64_t here = (vectors - x / kLanes<T> + tiles - 1) / tiles;
        tile_of_all_classes<T>(p, b, y, x, here, offsets);
        x += here * kLanes<T>;
      }
      if (x < p.width) tile_of_all_classes<T>(p, b, y, p.width - kLanes<T>, 1, offsets);
    }
    if (p.out.pad > 0) {
      for (int64_t i = p.active_begin[b]; i < p.active_begin[b + 1]; ++i) {
        replicate_border(plane_of<T>(p, p.out, b, i).row(y), p.out.pad, p.width);
      }
    }
  }
}

// Row y of the adjoint gathers from all rows whose step reads row y: one row inside, several at the borders.
// Sums run over x beyond both ends; the values there are added to the border columns.
template <typename T>
void adjoint_rows(const StencilParams& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t reach = p.stencil.reach_x < p.width ? p.stencil.reach_x : p.width - 1;
  const int64_t length = p.width + 2 * reach;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.height, y = item % p.height;
    for (int64_t i = p.active_begin[b]; i < p.active_begin[b + 1]; i += kAdjointBlock) {
      const int64_t left = p.active_begin[b + 1] - i;
      const int64_t block = left < kAdjointBlock ? left : kAdjointBlock;
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
              const T* grad = plane_of<const T>(p, p.in, b, i + c).row(from);
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
        T* out = plane_of<T>(p, p.out, b, i + c).row(y);
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
          const T* source = plane_of<const T>(p, p.in, b, i).row(from) + dx;
          const T* grad = plane_of<const T>(p, p.out, b, i).row(y);
#pragma GCC ivdep
          for (int64_t x = 0; x < p.width; ++x) target[x] += grad[x] * source[x];
        }
      }
    }
  }
}

}  // namespace

void stencil_step(const StencilParams& p, int64_t begin, int64_t end, int64_t* offsets) {
  if (p.kind == Kind::f64) {
    step_rows<double>(p, begin, end, offsets);
  } else {
    step_rows<float>(p, begin, end, offsets);
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
