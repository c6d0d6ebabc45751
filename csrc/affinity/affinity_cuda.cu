// Affinity from attention on CUDA. A block of 32 x 8 threads owns a tile of 32 x 32 pairs, and with it the
// mirrored tile: both are read from each map in rows of 32, added up over the maps in registers (four pairs a
// thread), and only the sums are transposed, through shared memory. So each entry of the K maps is read once,
// and each entry of their gradient is written once, in full lines. Tiles without a pair in the window are
// skipped, or filled with zeros. Sums towards the gradients of weight and bias and towards the loss are
// formed by block, then in a second launch over the blocks, always in the same order; no atomics.
#include "affinity/affinity.h"
#include "common/cuda.cuh"

namespace afa {
namespace {

constexpr int kTile = static_cast<int>(kAffinityTile);
constexpr int kTileRows = 8;             // rows of a tile that a block's threads cover at once
constexpr int kOwn = kTile / kTileRows;  // pairs of a tile that a thread owns: one in every kTileRows rows
constexpr int kTileThreads = kTile * kTileRows;
constexpr int kMapsAtOnce = 4;  // whose sums a block reduces together
constexpr int kSumThreads = 256;

dim3 tile_block() {
  return dim3(kTile, kTileRows);
}

dim3 block_grid(int64_t blocks) {
  return dim3(static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX));
}

struct Tile {
  int64_t b, row, column;  // image, first nodes
};

__device__ inline Tile tile_of(const PairLayout& p, int64_t index) {
  const int64_t tiles = tiles_of(p), rest = index % (tiles * tiles);
  return {index / (tiles * tiles), rest / tiles * kTile, rest % tiles * kTile};
}

// False only where no pair of the tile lies in the window.
__device__ inline bool meets_window(const PairLayout& p, const Tile& t) {
  if (p.radius < 0) return true;
  const int64_t last = nodes_of(p) - 1;
  const int64_t row_end = t.row + kTile - 1 < last ? t.row + kTile - 1 : last;
  const int64_t column_end = t.column + kTile - 1 < last ? t.column + kTile - 1 : last;
  return t.column / p.width - row_end / p.width <= p.radius &&
         t.row / p.width - column_end / p.width <= p.radius;
}

// Where the thread's `own`-th pair (row + y, column + x) lies in its image's pairs; -1 outside.
__device__ inline int64_t own_pair(const PairLayout& p, int64_t row, int64_t column, int own) {
  const int64_t i = row + threadIdx.y + own * kTileRows, j = column + threadIdx.x;
  return i < nodes_of(p) && j < nodes_of(p) ? pair_index(p, i, j) : -1;
}

// The same in one map, or -1: rows of N whatever the layout of the pairs.
__device__ inline int64_t own_entry(const PairLayout& p, int64_t row, int64_t column, int own) {
  const int64_t i = row + threadIdx.y + own * kTileRows, j = column + threadIdx.x;
  return i < nodes_of(p) && j < nodes_of(p) ? i * nodes_of(p) + j : -1;
}

// The mirrored tile's values, in the order of this one's pairs.
template <typename S>
__device__ void transpose(S (&tile)[kTile][kTile + 1], S (&value)[kOwn]) {
  __syncthreads();
  for (int own = 0; own < kOwn; ++own) tile[threadIdx.y + own * kTileRows][threadIdx.x] = value[own];
  __syncthreads();
  for (int own = 0; own < kOwn; ++own) value[own] = tile[threadIdx.x][threadIdx.y + own * kTileRows];
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, min_blocks<T>(3))
    affinity_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ Sum tile[kTile][kTile + 1];
  const PairLayout& pairs = p.pairs;
  const int64_t nodes = nodes_of(pairs), tiles = tiles_of(pairs), count = pairs.batch * tiles * tiles;
  const Sum* weight = static_cast<const Sum*>(p.weight);
  const Sum bias = *static_cast<const Sum*>(p.bias);
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const Tile t = tile_of(pairs, index);
    if (t.column < t.row || !meets_window(pairs, t)) continue;
    const T* source = static_cast<const T*>(p.attention) + t.b * p.maps * nodes * nodes;
    T* affinity = static_cast<T*>(p.affinity) + t.b * nodes * pairs_of_node(pairs);
    int64_t here[kOwn], mirror[kOwn];
    for (int own = 0; own < kOwn; ++own) {
      const bool in = own_pair(pairs, t.row, t.column, own) >= 0;
      const bool mirror_in = own_pair(pairs, t.column, t.row, own) >= 0;
      here[own] = in ? own_entry(pairs, t.row, t.column, own) : -1;
      mirror[own] = mirror_in ? own_entry(pairs, t.column, t.row, own) : -1;
    }
    Sum sum[kOwn] = {}, mirrored[kOwn] = {};
    for (int64_t k = 0; k < p.maps; ++k, source += nodes * nodes) {
      const Sum w = weight[k];
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (here[own] >= 0) sum[own] += w * to_sum<Sum>(source[here[own]]);
        if (mirror[own] >= 0) mirrored[own] += w * to_sum<Sum>(source[mirror[own]]);
      }
    }
    transpose(tile, mirrored);
    for (int own = 0; own < kOwn; ++own) {
      sum[own] = 1 / (1 + exp(-(sum[own] + mirrored[own] + bias)));
      const int64_t at = own_pair(pairs, t.row, t.column, own);
      if (at >= 0) affinity[at] = from_sum<T>(sum[own]);
    }
    if (t.row == t.column) continue;
    transpose(tile, sum);
    for (int own = 0; own < kOwn; ++own) {
      const int64_t at = own_pair(pairs, t.column, t.row, own);
      if (at >= 0) affinity[at] = from_sum<T>(sum[own]);
    }
  }
}

// The loss's gradient to sum_k weight_k S_k at the thread's pairs: (dA_ij + dA_ji) A_ij (1 - A_ij), 0
// outside.
template <typename T, typename Sum>
__device__ void logit_gradient(const AffinityParams& p, const Tile& t, Sum (&tile)[kTile][kTile + 1],
                               Sum (&gradient)[kOwn]) {
  const int64_t first = t.b * nodes_of(p.pairs) * pairs_of_node(p.pairs);
  const T* grad = static_cast<const T*>(p.grad) + first;
  const T* affinity = static_cast<const T*>(p.affinity) + first;
  for (int own = 0; own < kOwn; ++own) {
    const int64_t at = own_pair(p.pairs, t.column, t.row, own);
    gradient[own] = at >= 0 ? to_sum<Sum>(grad[at]) : Sum{0};
  }
  transpose(tile, gradient);
  for (int own = 0; own < kOwn; ++own) {
    const int64_t at = own_pair(p.pairs, t.row, t.column, own);
    const Sum a = at >= 0 ? to_sum<Sum>(affinity[at]) : Sum{0};
    gradient[own] = at >= 0 ? (gradient[own] + to_sum<Sum>(grad[at])) * a * (1 - a) : Sum{0};
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    backward_attention_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ Sum tile[kTile][kTile + 1];
  const PairLayout& pairs = p.pairs;
  const int64_t nodes = nodes_of(pairs), tiles = tiles_of(pairs), count = pairs.batch * tiles * tiles;
  const Sum* weight = static_cast<const Sum*>(p.weight);
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const Tile t = tile_of(pairs, index);
    if (t.column < t.row) continue;
    Sum gradient[kOwn] = {}, mirrored[kOwn] = {};
    if (meets_window(pairs, t)) {
      logit_gradient<T>(p, t, tile, gradient);
      for (int own = 0; own < kOwn; ++own) mirrored[own] = gradient[own];
      transpose(tile, mirrored);
    }
    T* out = static_cast<T*>(p.grad_attention) + t.b * p.maps * nodes * nodes;
    for (int64_t k = 0; k < p.maps; ++k, out += nodes * nodes) {
      const Sum w = weight[k];
      for (int own = 0; own < kOwn; ++own) {
        const int64_t at = own_entry(pairs, t.row, t.column, own);
        if (at >= 0) out[at] = from_sum<T>(w * gradient[own]);
        const int64_t mirror = own_entry(pairs, t.column, t.row, own);
        if (mirror >= 0 && t.row != t.column) out[mirror] = from_sum<T>(w * mirrored[own]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    backward_weight_kernel(const __grid_constant__ AffinityParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ Sum tile[kTile][kTile + 1];
  __shared__ Sum part[kMapsAtOnce][kTileThreads];
  __shared__ Sum row_sum[kMapsAtOnce][kTile];
  const PairLayout& pairs = p.pairs;
  const int64_t nodes = nodes_of(pairs), tiles = tiles_of(pairs), count = pairs.batch * tiles * tiles;
  const int thread = static_cast<int>(threadIdx.y * kTile + threadIdx.x);
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const Tile t = tile_of(pairs, index);
    Sum* partial = static_cast<Sum*>(p.partial) + index * (p.maps + 1);
    if (!meets_window(pairs, t)) {
      for (int64_t k = thread; k <= p.maps; k += kTileThreads) partial[k] = 0;
      continue;
    }
    Sum gradient[kOwn];
    logit_gradient<T>(p, t, tile, gradient);
    const T* source = static_cast<const T*>(p.attention) + t.b * p.maps * nodes * nodes;
    for (int64_t k0 = 0; k0 <= p.maps; k0 += kMapsAtOnce) {
      for (int m = 0; m < kMapsAtOnce; ++m) {
        Sum sum = 0;
        for (int own = 0; own < kOwn; ++own) {
          const int64_t at = own_entry(pairs, t.row, t.column, own);
          if (k0 + m < p.maps && gradient[own] != 0) {
            sum += gradient[own] * to_sum<Sum>(source[(k0 + m) * nodes * nodes + at]);
          } else if (k0 + m == p.maps) {
            sum += gradient[own] / 2;  // the bias: each pair is met in both of its entries
          }
        }
        part[m][thread] = sum;
      }
      __syncthreads();
      if (thread < kMapsAtOnce * kTile) {
        const int m = thread / kTile, lane = thread % kTile;
        Sum sum = 0;
        for (int n = 0; n < kTileRows; ++n) sum += part[m][n * kTile + lane];
        row_sum[m][lane] = sum;
      }
      __syncthreads();
      if (thread < kMapsAtOnce && k0 + thread <= p.maps) {
        Sum sum = 0;
        for (int lane = 0; lane < kTile; ++lane) sum += row_sum[thread][lane];
        partial[k0 + thread] = sum;
      }
    }
  }
}

// The sum over the block's threads, in thread 0; in a fixed order.
template <typename S>
__device__ S block_sum(S (&shared)[kSumThreads], S value) {
  __syncthreads();
  shared[threadIdx.x] = value;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? shared[0] : S{0};
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_partials_kernel(const Sum* partial, int64_t parts, int64_t size, Sum* out) {
  __shared__ double shared[kSumThreads];
  for (int64_t k = blockIdx.x; k < size; k += gridDim.x) {
    double sum = 0;
    for (int64_t part = threadIdx.x; part < parts; part += kSumThreads) {
      sum += static_cast<double>(partial[part * size + k]);
    }
    sum = block_sum(shared, sum);
    if (threadIdx.x == 0) out[k] = static_cast<Sum>(sum);
  }
}

__global__ void __launch_bounds__(kThreads) labels_kernel(const __grid_constant__ AffinityLabelParams p) {
  const PairLayout& pairs = p.pairs;
  const int64_t nodes = nodes_of(pairs), size = pairs_of_node(pairs), side = 2 * pairs.radius + 1;
  for (int64_t b = blockIdx.y; b < pairs.batch; b += gridDim.y) {
    const int64_t* tokens = p.tokens + b * nodes;
    uint8_t* labels = p.labels + b * nodes * size;
    for (int64_t item = first_item(); item < nodes * size; item += item_stride()) {
      const int64_t i = item / size, entry = item % size;
      int64_t j = entry;
      bool in = true;
      if (pairs.windowed) {
        const int64_t y = i / pairs.width + entry / side - pairs.radius;
        const int64_t x = i % pairs.width + entry % side - pairs.radius;
        in = y >= 0 && y < pairs.height && x >= 0 && x < pairs.width;
        j = y * pairs.width + x;
      } else {
        in = pair_index(pairs, i, j) >= 0;
      }
      in = in && tokens[i] != p.ignore && tokens[j] != p.ignore;
      labels[item] = in ? tokens[i] == tokens[j] : 255;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) loss_kernel(const __grid_constant__ AffinityLossParams p) {
  using Sum = typename SumOf<T>::type;
  __shared__ double shared[kSumThreads];
  const T* affinity = static_cast<const T*>(p.affinity);
  for (int64_t block = blockIdx.x; block * kLossBlock < p.count; block += gridDim.x) {
    const int64_t end = (block + 1) * kLossBlock < p.count ? (block + 1) * kLossBlock : p.count;
    Sum same = 0, different = 0;
    int same_count = 0, different_count = 0;
    for (int64_t n = block * kLossBlock + threadIdx.x; n < end; n += kSumThreads) {
      const uint8_t label = p.labels[n];
      if (label == 1) {
        same += 1 - to_sum<Sum>(affinity[n]);
        ++same_count;
      } else if (label == 0) {
        different += to_sum<Sum>(affinity[n]);
        ++different_count;
      }
    }
    const double own[4] = {static_cast<double>(same), static_cast<double>(different),
                           static_cast<double>(same_count), static_cast<double>(different_count)};
    for (int n = 0; n < 4; ++n) {
      const double sum = block_sum(shared, own[n]);
      if (threadIdx.x == 0) p.partial[4 * block + n] = sum;
    }
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_losses_kernel(const double* partial, int64_t blocks, Sum* out) {
  __shared__ double shared[kSumThreads];
  double total[4];
  for (int n = 0; n < 4; ++n) {
    double sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) sum += partial[4 * block + n];
    total[n] = block_sum(shared, sum);
  }
  if (threadIdx.x == 0) {
    const double same = 0.5 / (total[2] + 1), different = 0.5 / (total[3] + 1);
    out[0] = static_cast<Sum>(same * total[0] + different * total[1]);
    out[1] = static_cast<Sum>(same);
    out[2] = static_cast<Sum>(different);
  }
}

template <typename Sum>
__global__ void __launch_bounds__(kThreads)
    loss_backward_kernel(const __grid_constant__ AffinityLossParams p) {
  const Sum grad = *static_cast<const Sum*>(p.grad);
  const Sum* sums = static_cast<const Sum*>(p.sums);
  const Sum same = -grad * sums[1], different = grad * sums[2];
  Sum* out = static_cast<Sum*>(p.grad_affinity);
  for (int64_t n = first_item(); n < p.count; n += item_stride()) {
    const uint8_t label = p.labels[n];
    out[n] = label == 1 ? same : (label == 0 ? different : Sum{0});
  }
}

dim3 tile_grid(const PairLayout& p) {
  return block_grid(p.batch * tiles_of(p) * tiles_of(p));
}

}  // namespace

const char* affinity_cuda(const AffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((affinity_kernel<decltype(type)>), tile_grid(p.pairs), tile_block(), stream, p);
  });
  return launch_error();
}

const char* affinity_backward_attention_cuda(const AffinityParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((backward_attention_kernel<decltype(type)>), tile_grid(p.pairs), tile_block(), stream, p);
  });
  return launch_error();
}

const char* affinity_backward_weight_cuda(const AffinityParams& p, void* stream) {
  const int64_t parts = p.pairs.batch * tiles_of(p.pairs) * tiles_of(p.pairs);
  with_type(p.kind, [&](auto type) {
    using Sum = typename SumOf<decltype(type)>::type;
    AFA_LAUNCH((backward_weight_kernel<decltype(type)>), tile_grid(p.pairs), tile_block(), stream, p);
    AFA_LAUNCH((add_partials_kernel<Sum>), block_grid(p.maps + 1), kSumThreads, stream,
               static_cast<const Sum*>(p.partial), parts, p.maps + 1, static_cast<Sum*>(p.grad_weight));
  });
  return launch_error();
}

const char* affinity_labels_cuda(const AffinityLabelParams& p, void* stream) {
  const int64_t size = pairs_of_node(p.pairs);
  AFA_LAUNCH(labels_kernel, grid_for(nodes_of(p.pairs) * size, p.pairs.batch), kThreads, stream, p);
  return launch_error();
}

const char* affinity_loss_cuda(const AffinityLossParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.count, kLossBlock);
  with_type(p.kind, [&](auto type) {
    using Sum = typename SumOf<decltype(type)>::type;
    if (blocks > 0) AFA_LAUNCH((loss_kernel<decltype(type)>), block_grid(blocks), kSumThreads, stream, p);
    AFA_LAUNCH((add_losses_kernel<Sum>), 1, kSumThreads, stream, p.partial, blocks,
               static_cast<Sum*>(p.sums));
  });
  return launch_error();
}

const char* affinity_loss_backward_cuda(const AffinityLossParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    using Sum = typename SumOf<decltype(type)>::type;
    AFA_LAUNCH((loss_backward_kernel<Sum>), grid_for(p.count, 1), kThreads, stream, p);
  });
  return launch_error();
}

}  // namespace afa
