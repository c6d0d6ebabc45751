// The permutohedral lattice and the mean field on CUDA, image by image.
//
// Building: a thread finds a pixel's simplex, and writes the keys and weights of its corners. The corners are
// sorted by key, 5 bits at a time and stably: equal keys become a vertex, whose list of pixels is in order. A
// vertex's neighbors are found by binary search among the sorted keys. Nothing is hashed: a hash table needs
// atomics, and the order of its lists, and so of the sums, would change from run to run. The number of
// vertices stays on the device, where later kernels read it; grids and tables have room for N * (dims + 1).
//
// Filtering: a thread owns a channel of a vertex or of a pixel, channels side by side, and gathers. A vertex
// is read once per direction of blur. Softmax: a warp owns a pixel.
#include "common/cuda.cuh"
#include "crf/crf.h"

namespace afa {
namespace {

constexpr int kScanThreads = 512;
constexpr int64_t kMostItems = int64_t{1}
                               << 22;  // of grids over vertices, whose number the host does not know
constexpr unsigned kAllLanes = 0xffffffffu;

// Rounded to float, and not part of a fused multiply-add: see crf_cpu.cpp.
__device__ inline float rounded_product(float a, float b) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b));
}

template <int D>
__global__ void __launch_bounds__(kThreads) simplex_kernel(const __grid_constant__ LatticeBuildParams p) {
  constexpr int E = D + 1;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
  const int bits = key_bits(D);
  const float limit = static_cast<float>(key_limit(D)), inverse = 1.0f / E;
  float* const weights = reinterpret_cast<float*>(p.words + p.layout.weight());
  for (int64_t i = first_item(); i < p.layout.pixels; i += item_stride()) {
    float elevated[E], rest[E], sum = 0;
#pragma unroll
    for (int j = D; j > 0; --j) {
      const float scaled = rounded_product(p.features[(j - 1) * p.layout.pixels + i], p.scale[j - 1]);
      elevated[j] = sum - rounded_product(scaled, static_cast<float>(j));
      sum += scaled;
    }
    elevated[0] = sum;
    int cell[E], rank[E], total = 0;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      float v = rounded_product(inverse, elevated[k]);
      v = v > -limit ? (v < limit ? v : limit) : -limit;  // NaN too
      v = (v + kRound) - kRound;
      rest[k] = elevated[k] - v * static_cast<float>(E);
      cell[k] = static_cast<int>(v);
      total += cell[k];
      rank[k] = 0;
    }
#pragma unroll
    for (int a = 0; a < D; ++a) {
#pragma unroll
      for (int b = a + 1; b < E; ++b) {
        const int less = rest[a] < rest[b] ? 1 : 0;
        rank[a] += less;
        rank[b] += 1 - less;
      }
    }
    float sorted[E];
    uint64_t unit[E], key = 0;
#pragma unroll
    for (int r = 0; r < E; ++r) {
      sorted[r] = 0;
      unit[r] = 0;
    }
#pragma unroll
    for (int k = 0; k < E; ++k) {
      rank[k] += total;
      const int step = (rank[k] < 0 ? 1 : 0) - (rank[k] > D ? 1 : 0);
      rank[k] += step * E;
      cell[k] += step;
      rest[k] -= static_cast<float>(step * E);
      const float value = rounded_product(rest[k], inverse);
      const uint64_t one = k < D ? uint64_t{1} << (3 + k * bits) : 0;
      key += one * static_cast<uint64_t>(cell[k] + key_bias(D));
#pragma unroll
      for (int r = 0; r < E; ++r) {
        sorted[r] = rank[k] == r ? value : sorted[r];
        unit[r] = rank[k] == r ? one : unit[r];
      }
    }
#pragma unroll
    for (int r = 0; r < E; ++r) {
      if (r > 0) key += 1 - unit[D - r + 1];
      const float share = r == 0 ? sorted[D] + (1.0f - sorted[0]) : sorted[D - r] - sorted[D - r + 1];
      weights[i * E + r] = share;
      p.keys[0][i * E + r] = key;
      p.entries[0][i * E + r] = static_cast<int32_t>(i * E + r);
    }
  }
}

__device__ inline int digit_of(uint64_t key, int shift) {
  return static_cast<int>(key >> shift) & static_cast<int>(kDigits - 1);
}

// counts[digit][tile]: how many of a tile's keys have the digit.
__global__ void __launch_bounds__(kThreads)
    sort_count_kernel(const __grid_constant__ LatticeBuildParams p, int source, int shift) {
  __shared__ int counts[kDigits][kThreads + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t items = p.layout.entries(), tiles = (items + kSortTile - 1) / kSortTile;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int d = 0; d < kDigits; ++d) counts[d][thread] = 0;
    const int64_t first = tile * kSortTile + thread * kSortItems;
    for (int64_t i = first; i < first + kSortItems && i < items; ++i) {
      ++counts[digit_of(p.keys[source][i], shift)][thread];
    }
    __syncthreads();
    if (thread < kDigits) {
      int sum = 0;
      for (int t = 0; t < kThreads; ++t) sum += counts[thread][t];
      p.counts[thread * tiles + tile] = sum;
    }
    __syncthreads();
  }
}

// Each of `items` counts becomes the sum of those before it. One block.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int32_t* counts, int64_t items) {
  __shared__ int sums[2][kScanThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t each = (items + kScanThreads - 1) / kScanThreads;
  const int64_t first = thread * each, last = first + each < items ? first + each : items;
  int sum = 0;
  for (int64_t i = first; i < last; ++i) sum += counts[i];
  sums[0][thread] = sum;
  __syncthreads();
  int now = 0;
  for (int step = 1; step < kScanThreads; step *= 2, now = 1 - now) {
    sums[1 - now][thread] = sums[now][thread] + (thread >= step ? sums[now][thread - step] : 0);
    __syncthreads();
  }
  int before = sums[now][thread] - sum;
  for (int64_t i = first; i < last; ++i) {
    const int count = counts[i];
    counts[i] = before;
    before += count;
  }
}

__global__ void __launch_bounds__(kThreads)
    sort_move_kernel(const __grid_constant__ LatticeBuildParams p, int source, int shift) {
  __shared__ int places[kDigits][kThreads + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t items = p.layout.entries(), tiles = (items + kSortTile - 1) / kSortTile;
  const uint64_t* const keys = p.keys[source];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int d = 0; d < kDigits; ++d) places[d][thread] = 0;
    const int64_t first = tile * kSortTile + thread * kSortItems;
    for (int64_t i = first; i < first + kSortItems && i < items; ++i)
      ++places[digit_of(keys[i], shift)][thread];
    __syncthreads();
    if (thread < kDigits) {
      int place = p.counts[thread * tiles + tile];
      for (int t = 0; t < kThreads; ++t) {
        const int count = places[thread][t];
        places[thread][t] = place;
        place += count;
      }
    }
    __syncthreads();
    for (int64_t i = first; i < first + kSortItems && i < items; ++i) {
      const uint64_t key = keys[i];
      const int to = places[digit_of(key, shift)][thread]++;
      p.keys[1 - source][to] = key;
      p.entries[1 - source][to] = p.entries[source][i];
    }
    __syncthreads();
  }
}

__device__ inline bool begins_vertex(const uint64_t* keys, int64_t i) {
  return i == 0 || keys[i] != keys[i - 1];
}

__global__ void __launch_bounds__(kThreads)
    head_count_kernel(const __grid_constant__ LatticeBuildParams p, int source) {
  __shared__ int counts[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t items = p.layout.entries(), tiles = (items + kSortTile - 1) / kSortTile;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kSortTile + thread * kSortItems;
    int count = 0;
    for (int64_t i = first; i < first + kSortItems && i < items; ++i) {
      count += begins_vertex(p.keys[source], i) ? 1 : 0;
    }
    counts[thread] = count;
    __syncthreads();
    if (thread == 0) {
      int sum = 0;
      for (int t = 0; t < kThreads; ++t) sum += counts[t];
      p.counts[tile] = sum;
    }
    __syncthreads();
  }
}

// Vertices are numbered in the order of their keys; the unique keys go to the other copy.
__global__ void __launch_bounds__(kThreads)
    vertex_kernel(const __grid_constant__ LatticeBuildParams p, int source) {
  __shared__ int numbers[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t items = p.layout.entries(), tiles = (items + kSortTile - 1) / kSortTile;
  const int32_t corners = static_cast<int32_t>(p.layout.corners());
  const uint64_t* const keys = p.keys[source];
  int32_t* const words = p.words;
  const float* const weight = reinterpret_cast<const float*>(words + p.layout.weight());
  float* const share = reinterpret_cast<float*>(words + p.layout.share());
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kSortTile + thread * kSortItems;
    int count = 0;
    for (int64_t i = first; i < first + kSortItems && i < items; ++i) count += begins_vertex(keys, i) ? 1 : 0;
    numbers[thread] = count;
    __syncthreads();
    if (thread == 0) {
      int number = p.counts[tile];
      for (int t = 0; t < kThreads; ++t) {
        const int own = numbers[t];
        numbers[t] = number;
        number += own;
      }
    }
    __syncthreads();
    int next = numbers[thread];  // of the vertices that begin before here
    for (int64_t i = first; i < first + kSortItems && i < items; ++i) {
      if (begins_vertex(keys, i)) {
        words[p.layout.start() + next] = static_cast<int32_t>(i);
        p.keys[1 - source][next] = keys[i];
        ++next;
      }
      const int32_t entry = p.entries[source][i];
      words[p.layout.offset() + entry] = next - 1;
      words[p.layout.pixel() + i] = entry / corners;
      share[i] = weight[entry];
      if (i == items - 1) {
        words[0] = next;
        words[p.layout.start() + next] = static_cast<int32_t>(items);
      }
    }
    __syncthreads();
  }
}

__device__ inline int32_t find_key(const uint64_t* keys, int32_t count, uint64_t key) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && keys[low] == key ? low : count;
}

__global__ void __launch_bounds__(kThreads)
    neighbor_kernel(const __grid_constant__ LatticeBuildParams p, int source) {
  const int32_t vertices = p.words[0];
  const int64_t dims = p.layout.dims, items = vertices * p.layout.corners();
  const uint64_t* const keys = p.keys[source];
  int32_t* const neighbor = p.words + p.layout.neighbor();
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t axis = item / vertices, v = item - axis * vertices;
    neighbor[2 * item] = find_key(keys, vertices, key_neighbor(keys[v], dims, axis));
    neighbor[2 * item + 1] = find_key(keys, vertices, key_neighbor_below(keys[v], dims, axis));
  }
}

// A pixel's factor before or after the filter.
__device__ inline float pixel_factor(Normalize normalize, bool before, float norm) {
  const float whole = norm + 1e-20f;
  if (normalize == Normalize::symmetric) return 1.0f / sqrtf(whole);
  return normalize == (before ? Normalize::before : Normalize::after) ? 1.0f / whole : 1.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) splat_kernel(const __grid_constant__ LatticeStepParams p) {
  const Lattice lattice = lattice_at(p.layout, p.words);
  const T* const in = static_cast<const T*>(p.in);
  T* const out = static_cast<T*>(p.out);
  const bool scaled = p.normalize == Normalize::symmetric || p.normalize == Normalize::before;
  for (int64_t item = first_item(); item < lattice.vertices * p.width; item += item_stride()) {
    const int64_t v = item / p.width, c = p.first + item - v * p.width;
    const int32_t last = lattice.start[v + 1];
    T sum = 0;
    for (int32_t e = lattice.start[v]; e < last; ++e) {
      const int64_t pixel = lattice.pixel[e];
      T share = static_cast<T>(lattice.share[e]);
      if (scaled) share *= static_cast<T>(pixel_factor(p.normalize, true, lattice.norm[pixel]));
      sum += in == nullptr ? share : share * in[pixel * p.channels + c];
    }
    out[item] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) blur_kernel(const __grid_constant__ LatticeStepParams p) {
  const Lattice lattice = lattice_at(p.layout, p.words);
  const T* const in = static_cast<const T*>(p.in);
  T* const out = static_cast<T*>(p.out);
  const int32_t* const neighbor = lattice.neighbor + 2 * p.axis * lattice.vertices;
  for (int64_t item = first_item(); item < lattice.vertices * p.width; item += item_stride()) {
    const int64_t v = item / p.width, c = item - v * p.width;
    const int64_t above = neighbor[2 * v], below = neighbor[2 * v + 1];
    T sides = above < lattice.vertices ? in[above * p.width + c] : T{0};
    sides += below < lattice.vertices ? in[below * p.width + c] : T{0};
    out[item] = in[item] + static_cast<T>(0.5) * sides;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) slice_kernel(const __grid_constant__ LatticeStepParams p) {
  const Lattice lattice = lattice_at(p.layout, p.words);
  const T* const in = static_cast<const T*>(p.in);
  T* const out = static_cast<T*>(p.out);
  const int64_t corners = p.layout.corners();
  const bool scaled = p.normalize == Normalize::symmetric || p.normalize == Normalize::after;
  for (int64_t item = first_item(); item < lattice.pixels * p.width; item += item_stride()) {
    const int64_t i = item / p.width, c = item - i * p.width;
    T sum = 0;
    for (int64_t e = i * corners; e < (i + 1) * corners; ++e) {
      sum += static_cast<T>(lattice.weight[e]) * in[lattice.offset[e] * p.width + c];
    }
    const float factor = scaled ? pixel_factor(p.normalize, false, lattice.norm[i]) * p.gain : p.gain;
    T* const to = out + i * p.channels + p.first + c;
    *to = static_cast<T>(factor) * sum + (p.add ? *to : T{0});
  }
}

template <typename T, typename Row>
__global__ void __launch_bounds__(kThreads) rows_from_planes_kernel(const __grid_constant__ RowsParams p) {
  const T* const from = static_cast<const T*>(p.from);
  Row* const to = static_cast<Row*>(p.to);
  for (int64_t c = blockIdx.y; c < p.channels; c += gridDim.y) {
    const bool kept = p.mask == nullptr || p.mask[c];
    for (int64_t i = first_item(); i < p.pixels; i += item_stride()) {
      Row value = to_sum<Row>(from[c * p.pixels + i]);
      if (p.log) value = static_cast<Row>(logf(fmaxf(static_cast<float>(value), 1e-5f)));
      if (p.negate) value = -value;
      to[i * p.channels + c] = kept ? value : static_cast<Row>(-1e30f);
    }
  }
}

template <typename T, typename Row>
__global__ void __launch_bounds__(kThreads) planes_from_rows_kernel(const __grid_constant__ RowsParams p) {
  const Row* const from = static_cast<const Row*>(p.from);
  T* const to = static_cast<T*>(p.to);
  for (int64_t c = blockIdx.y; c < p.channels; c += gridDim.y) {
    const bool kept = p.mask == nullptr || p.mask[c];
    for (int64_t i = first_item(); i < p.pixels; i += item_stride()) {
      to[c * p.pixels + i] = from_sum<T>(kept ? from[i * p.channels + c] : Row{0});
    }
  }
}

// The same for all lanes of a warp: each has the result.
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, lane));
  return v;
}
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(kAllLanes, v, lane);
  return v;
}

// Entry c of (M + M^T) / 2 times the values.
__device__ inline float mixed(const float* matrix, const float* values, int64_t c, int64_t channels) {
  const float *row = matrix + c * channels, *column = matrix + c;
  float sum = 0;
#pragma unroll 1
  for (int64_t k = 0; k < channels; ++k, column += channels) sum += 0.5f * (row[k] + *column) * values[k];
  return sum;
}

__global__ void __launch_bounds__(kThreads) field_softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = item_stride() / 32;
  for (int64_t i = first_item() / 32; i < p.pixels; i += warps) {
    float* const out = p.out + i * p.channels;
    const float* const logits = p.logits + i * p.channels;
    const float* const filtered = p.filtered == nullptr ? nullptr : p.filtered + i * p.channels;
    float top = -3e38f;
    for (int64_t c = lane; c < p.channels; c += 32) {
      float value = logits[c];
      if (p.compatibility != nullptr && p.filtered != nullptr) {
        value -= mixed(p.compatibility, filtered, c, p.channels);
      } else if (p.filtered != nullptr) {
        value += filtered[c];
      }
      out[c] = value;
      top = fmaxf(top, value);
    }
    top = warp_max(top);
    float sum = 0;
    for (int64_t c = lane; c < p.channels; c += 32) {
      const float power = expf(out[c] - top);
      out[c] = power;
      sum += power;
    }
    sum = warp_sum(sum);
    for (int64_t c = lane; c < p.channels; c += 32) out[c] /= sum;
  }
}

template <typename F>
void with_sum(Kind kind, const F& f) {
  if (kind == Kind::f64) {
    f(double{});
  } else {
    f(float{});
  }
}

dim3 vertex_grid(const LatticeLayout& layout, int64_t width) {
  const int64_t items = layout.entries() * width;
  return grid_for(items < kMostItems ? items : kMostItems, 1);
}

void launch_simplices(const LatticeBuildParams& p, dim3 grid, void* stream) {
  switch (p.layout.dims) {
    case 1:
      AFA_LAUNCH(simplex_kernel<1>, grid, kThreads, stream, p);
      break;
    case 2:
      AFA_LAUNCH(simplex_kernel<2>, grid, kThreads, stream, p);
      break;
    case 3:
      AFA_LAUNCH(simplex_kernel<3>, grid, kThreads, stream, p);
      break;
    case 4:
      AFA_LAUNCH(simplex_kernel<4>, grid, kThreads, stream, p);
      break;
    case 5:
      AFA_LAUNCH(simplex_kernel<5>, grid, kThreads, stream, p);
      break;
    default:
      AFA_LAUNCH(simplex_kernel<6>, grid, kThreads, stream, p);
  }
}

}  // namespace

const char* launch_lattice_splat(const LatticeStepParams& p, void* stream) {
  with_sum(p.kind, [&](auto type) {
    AFA_LAUNCH((splat_kernel<decltype(type)>), vertex_grid(p.layout, p.width), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_blur(const LatticeStepParams& p, void* stream) {
  with_sum(p.kind, [&](auto type) {
    AFA_LAUNCH((blur_kernel<decltype(type)>), vertex_grid(p.layout, p.width), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_slice(const LatticeStepParams& p, void* stream) {
  with_sum(p.kind, [&](auto type) {
    AFA_LAUNCH((slice_kernel<decltype(type)>), grid_for(p.layout.pixels * p.width, 1), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_build(const LatticeBuildParams& p, void* stream) {
  const int64_t items = p.layout.entries(), tiles = ceil_div(items, kSortTile);
  const dim3 sort_grid = grid_for(tiles * kThreads, 1);
  launch_simplices(p, grid_for(p.layout.pixels, 1), stream);
  int source = 0;
  const int64_t bits = 3 + p.layout.dims * key_bits(p.layout.dims);
  for (int shift = 0; shift < bits; shift += kDigitBits, source = 1 - source) {
    AFA_LAUNCH(sort_count_kernel, sort_grid, kThreads, stream, p, source, shift);
    AFA_LAUNCH(scan_kernel, dim3(1), kScanThreads, stream, p.counts, kDigits * tiles);
    AFA_LAUNCH(sort_move_kernel, sort_grid, kThreads, stream, p, source, shift);
  }
  AFA_LAUNCH(head_count_kernel, sort_grid, kThreads, stream, p, source);
  AFA_LAUNCH(scan_kernel, dim3(1), kScanThreads, stream, p.counts, tiles);
  AFA_LAUNCH(vertex_kernel, sort_grid, kThreads, stream, p, source);
  AFA_LAUNCH(neighbor_kernel, vertex_grid(p.layout, p.layout.corners()), kThreads, stream, p, 1 - source);
  if (const char* error = launch_error()) return error;

  LatticeStepParams step;
  step.layout = p.layout;
  step.words = p.words;
  step.width = step.channels = 1;
  step.out = p.values[0];
  if (const char* error = launch_lattice_splat(step, stream)) return error;
  for (int64_t axis = 0; axis < p.layout.corners(); ++axis) {
    step.axis = axis;
    step.in = p.values[axis % 2];
    step.out = p.values[1 - axis % 2];
    if (const char* error = launch_lattice_blur(step, stream)) return error;
  }
  step.in = step.out;
  step.out = p.words + p.layout.norm();
  step.gain = lattice_gain(p.layout.dims);
  return launch_lattice_slice(step, stream);
}

const char* launch_rows_from_planes(const RowsParams& p, void* stream) {
  const dim3 grid = grid_for(p.pixels, p.channels);
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    if (p.log || p.negate) {
      AFA_LAUNCH((rows_from_planes_kernel<T, float>), grid, kThreads, stream, p);
    } else {
      AFA_LAUNCH((rows_from_planes_kernel<T, typename SumOf<T>::type>), grid, kThreads, stream, p);
    }
  });
  return launch_error();
}

const char* launch_planes_from_rows(const RowsParams& p, void* stream) {
  const dim3 grid = grid_for(p.pixels, p.channels);
  with_type(p.kind, [&](auto type) {
    using T = decltype(type);
    AFA_LAUNCH((planes_from_rows_kernel<T, typename SumOf<T>::type>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_field_softmax(const SoftmaxParams& p, void* stream) {
  AFA_LAUNCH(field_softmax_kernel, grid_for(p.pixels * 32, 1), kThreads, stream, p);
  return launch_error();
}

}  // namespace afa
