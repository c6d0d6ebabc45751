// The permutohedral lattice and the mean field on CUDA, image by image.
//
// Building: a thread finds a pixel's simplex, and writes the keys and weights of its corners. The corners are
// sorted by key, 8 bits at a time and stably: equal keys become a vertex, whose list of pixels is in order. A
// vertex's neighbors are found by binary search among the sorted keys. Nothing is hashed: a hash table needs
// atomics, and the order of its lists, and so of the sums, would change from run to run. The number of
// vertices stays on the device, where later kernels read it; tables have room for N * (dims + 1). A grid for
// that many would be mostly idle blocks, so grids over vertices have what the device can run at once.
//
// Filtering: the threads of a row of channels own a vector of up to 4 channels each, and gather. Splat: the
// sorted corners are divided into runs of 32, so that a vertex of a flat region, which has most of the
// pixels, is not summed by one thread. A run adds up its vertices in order; what continues the vertex of the
// run before is a row of its own, a head, added later. Blur: a vertex is read once per direction. Slice: the
// last step of a mean field's iteration computes the softmax, too: the row of a pixel is in the registers of
// a part of a warp. With more channels than fit there, or a matrix of compatibilities, the softmax is a
// kernel of its own.
#include "common/vectors.cuh"
#include "crf/lattice_cuda.h"

namespace afa {
namespace {

constexpr int64_t kResidentBlocks = 16;  // per SM, of kThreads threads: all that an SM can have
constexpr int kSortWarps = static_cast<int>(kSortThreads / 32),
              kSortItems = static_cast<int>(kSortTile / kSortThreads);
constexpr int kOverflowThreads = 512;
constexpr int64_t kShortRuns = 8;  // heads of a vertex that a row of threads adds up
constexpr unsigned kAllLanes = 0xffffffffu;

// Rounded to float, and not part of a fused multiply-add: see lattice_cpu.cpp.
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

// The lanes that have this digit, of those in `lanes`. All lanes call it.
__device__ inline unsigned lanes_with(int digit, unsigned lanes) {
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = (digit >> bit & 1) != 0;
    const unsigned with = __ballot_sync(kAllLanes, set);
    lanes &= set ? with : ~with;
  }
  return lanes;
}

__device__ inline unsigned lanes_before() {
  return (1u << (threadIdx.x % 32)) - 1;
}

// A thread's keys of a tile. A warp's keys are consecutive, and lanes side by side.
struct SortKeys {
  int64_t first;  // of the thread; the next are 32 apart
  uint64_t key[kSortItems];
  int before[kSortItems];  // keys of the warp that come before and have the same digit
};

// counts[warp][digit] becomes how many of the warp's keys have the digit.
__device__ inline void count_digits(const uint64_t* keys, int64_t tile, int64_t items, int shift,
                                    int (*counts)[kDigits], SortKeys& own) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int w = 0; w < kSortWarps; ++w) counts[w][thread] = 0;
  own.first = tile * kSortTile + warp * (kSortItems * 32) + lane;
#pragma unroll
  for (int n = 0; n < kSortItems; ++n) {
    own.key[n] = own.first + n * 32 < items ? keys[own.first + n * 32] : 0;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kSortItems; ++n) {
    if (own.first - lane + n * 32 >= items) break;  // the same for all lanes
    const int digit = digit_of(own.key[n], shift);
    const bool inside = own.first + n * 32 < items;
    const unsigned same = lanes_with(digit, __ballot_sync(kAllLanes, inside));
    const unsigned before = same & lanes_before();
    const int count = counts[warp][digit];
    own.before[n] = count + __popc(before);
    __syncwarp();
    if (inside && before == 0) counts[warp][digit] = count + __popc(same);
    __syncwarp();
  }
  __syncthreads();
}

// The sum of the values of this lane and those before it, of `lanes` lanes side by side, a power of two.
__device__ inline int lanes_scan(int sum, int lanes) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    if (step >= lanes) break;
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    sum += static_cast<int>(threadIdx.x) % lanes >= step ? other : 0;
  }
  return sum;
}

// The sum of the values of the threads before this one, and in `total` of all; sums: for each warp, one.
__device__ inline int sum_before(int value, int* sums, int& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = lanes_scan(value, 32);
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  sum -= value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    sum += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  return sum;
}

// counts[digit][tile]: how many of a tile's keys have the digit.
__global__ void __launch_bounds__(kSortThreads, 4)
    sort_count_kernel(const __grid_constant__ LatticeBuildParams p, int source, int shift) {
  __shared__ int counts[kSortWarps][kDigits];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t items = p.layout.entries(), tiles = sort_tiles(items);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    SortKeys own;
    count_digits(p.keys[source], tile, items, shift, counts, own);
    int sum = 0;
    for (int w = 0; w < kSortWarps; ++w) sum += counts[w][thread];
    p.counts[thread * tiles + tile] = sum;
    __syncthreads();
  }
}

// In each row of `tiles` counts, each becomes the sum of those before it; totals[row] that of all. A row has
// `lanes` threads of a warp, all of which have rows.
__global__ void __launch_bounds__(kThreads)
    scan_kernel(int32_t* counts, int32_t* totals, int64_t rows, int64_t tiles, int lanes) {
  constexpr int kAhead = 4;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int64_t row = first_item() / lanes; row < rows; row += item_stride() / lanes) {
    int32_t* const own = counts + row * tiles + lane;
    int before = 0;
    for (int64_t first = 0; first < tiles; first += kAhead * lanes) {
      int count[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int64_t i = first + n * lanes;
        count[n] = i + lane < tiles ? own[i] : 0;
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int64_t i = first + n * lanes;
        if (i >= tiles) break;  // the same for all lanes
        const int sum = lanes_scan(count[n], lanes);
        if (i + lane < tiles) own[i] = before + sum - count[n];
        before += __shfl_sync(kAllLanes, sum, lanes - 1, lanes);
      }
    }
    if (lane == 0) totals[row] = before;
  }
}

// A tile is sorted in shared memory first, so that keys with equal digits are written side by side.
__global__ void __launch_bounds__(kSortThreads, 3)
    sort_move_kernel(const __grid_constant__ LatticeBuildParams p, int source, int shift) {
  __shared__ int counts[kSortWarps][kDigits], places[kDigits], offsets[kDigits], sums[kSortWarps];
  __shared__ uint64_t keys[kSortTile];
  __shared__ int32_t entries[kSortTile];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t items = p.layout.entries(), tiles = sort_tiles(items);
  int total;
  const int digit_begin = sum_before(p.counts[kDigits * tiles + thread], sums, total);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    SortKeys own;
    count_digits(p.keys[source], tile, items, shift, counts, own);
    int count = 0;
    for (int w = 0; w < kSortWarps; ++w) {
      const int of_warp = counts[w][thread];
      counts[w][thread] = count;
      count += of_warp;
    }
    const int place = sum_before(count, sums, total);
    places[thread] = place;
    offsets[thread] = digit_begin + p.counts[thread * tiles + tile] - place;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kSortItems; ++n) {
      const int64_t i = own.first + n * 32;
      if (i >= items) continue;
      const int digit = digit_of(own.key[n], shift);
      const int to = places[digit] + counts[warp][digit] + own.before[n];
      keys[to] = own.key[n];
      entries[to] = p.entries[source][i];
    }
    __syncthreads();
    for (int i = thread; i < total; i += static_cast<int>(kSortThreads)) {
      const uint64_t key = keys[i];
      const int to = offsets[digit_of(key, shift)] + i;
      p.keys[1 - source][to] = key;
      p.entries[1 - source][to] = entries[i];
    }
    __syncthreads();
  }
}

__device__ inline bool begins_vertex(const uint64_t* keys, int64_t i) {
  return i == 0 || keys[i] != keys[i - 1];
}

// counts[tile]: how many vertices begin in a tile.
__global__ void __launch_bounds__(kSortThreads)
    begin_count_kernel(const __grid_constant__ LatticeBuildParams p, int source) {
  const int64_t items = p.layout.entries(), tiles = sort_tiles(items);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int count = 0;
    for (int n = 0; n < kSortItems; ++n) {
      const int64_t first = tile * kSortTile + n * kSortThreads, i = first + threadIdx.x;
      if (first >= items) break;  // the same for all threads
      count += __syncthreads_count(i < items && begins_vertex(p.keys[source], i));
    }
    if (threadIdx.x == 0) p.counts[tile] = count;
  }
}

// Vertices are numbered in the order of their keys; the unique keys go to the other copy.
__global__ void __launch_bounds__(kSortThreads)
    vertex_kernel(const __grid_constant__ LatticeBuildParams p, int source) {
  __shared__ int counts[kSortWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t items = p.layout.entries(), tiles = sort_tiles(items);
  const int32_t corners = static_cast<int32_t>(p.layout.corners());
  const uint64_t* const keys = p.keys[source];
  int32_t* const words = p.words;
  const float* const weight = reinterpret_cast<const float*>(words + p.layout.weight());
  float* const share = reinterpret_cast<float*>(words + p.layout.share());
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kSortTile + warp * (kSortItems * 32) + lane;
    unsigned begins[kSortItems];
    int count = 0;
#pragma unroll
    for (int n = 0; n < kSortItems; ++n) {
      const int64_t i = first + n * 32;
      begins[n] = __ballot_sync(kAllLanes, i < items && begins_vertex(keys, i));
      count += __popc(begins[n]);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int next = p.counts[tile];  // vertices that begin before here
    for (int w = 0; w < warp; ++w) next += counts[w];
#pragma unroll
    for (int n = 0; n < kSortItems; ++n) {
      const int64_t i = first + n * 32;
      const bool begin = (begins[n] >> lane & 1) != 0;
      const int32_t vertex = next + __popc(begins[n] & lanes_before()) - (begin ? 0 : 1);
      next += __popc(begins[n]);
      if (i >= items) continue;
      if (begin) p.keys[1 - source][vertex] = keys[i];
      const int32_t entry = p.entries[source][i], pixel = entry / corners;
      words[p.layout.offset() + entry] = vertex;
      words[p.layout.pixel() + i] = begin ? ~pixel : pixel;
      share[i] = weight[entry];
      if (i % kRun == 0) words[p.layout.first() + i / kRun] = vertex;
      if (i == items - 1) words[0] = vertex + 1;
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
  const int64_t dims = p.layout.dims;
  const uint64_t* const keys = p.keys[source];
  for (int64_t axis = blockIdx.y; axis <= dims; axis += gridDim.y) {
    int32_t* const neighbor = p.words + p.layout.neighbor() + 2 * axis * vertices;
    for (int64_t v = first_item(); v < vertices; v += item_stride()) {
      neighbor[2 * v] = find_key(keys, vertices, key_neighbor(keys[v], dims, axis));
      neighbor[2 * v + 1] = find_key(keys, vertices, key_neighbor_below(keys[v], dims, axis));
    }
  }
}

// A pixel's factor before or after the filter.
__device__ inline float pixel_factor(Normalize normalize, bool before, float norm) {
  const float whole = norm + 1e-20f;
  if (normalize == Normalize::symmetric) return rsqrtf(whole);
  return normalize == (before ? Normalize::before : Normalize::after) ? 1.0f / whole : 1.0f;
}

// Rows of `width` channels: threads side by side own the vectors of a row. A block has as many rows as fit,
// and the threads left over have none.
struct RowThread {
  int rows, vectors;  // of the block
  int row, column;    // of the thread; row >= rows: none
};

template <int V>
__device__ inline RowThread row_thread(int64_t width) {
  RowThread own;
  own.vectors = static_cast<int>(width) / V;
  own.rows = kThreads / own.vectors;
  own.row = static_cast<int>(threadIdx.x) / own.vectors;
  own.column = (static_cast<int>(threadIdx.x) - own.row * own.vectors) * V;
  return own;
}

template <typename T, int V>
__device__ inline void add(Vec<T, V>& sum, const Vec<T, V>& v) {
#pragma unroll
  for (int k = 0; k < V; ++k) sum.at[k] += v.at[k];
}
template <typename T, int V>
__device__ inline void add_product(Vec<T, V>& sum, T factor, const Vec<T, V>& v) {
#pragma unroll
  for (int k = 0; k < V; ++k) sum.at[k] += factor * v.at[k];
}

// The first row of a lattice in the tables, or -1 if it is not there: see LatticeStepsParams.
__device__ inline int64_t table_row(const LatticeStepsParams& steps, int64_t n) {
  if (steps.count == 1) return 0;
  const int64_t before = steps.of[0].words[0];
  const bool fit = before + steps.of[1].words[0] <= steps.room;
  return n == 0 ? (fit ? 0 : -1) : (fit ? before : 0);
}

// Sums the entries of a run, for a vector of channels.
template <typename T, int V>
__device__ inline void splat_run(const LatticeStepParams& p, const Lattice& lattice, int64_t run, int column,
                                 T* table, T* heads) {
  constexpr int kAhead = 4;  // rows that are read at once
  const T* const in = static_cast<const T*>(p.in);
  const int64_t entries = p.layout.entries(), first = run * kRun;
  const int64_t last = first + kRun < entries ? first + kRun : entries;
  const bool scaled = p.normalize == Normalize::symmetric || p.normalize == Normalize::before;
  int64_t vertex = lattice.first[run];
  T* to = lattice.pixel[first] < 0 ? table + vertex * p.width : heads + run * p.width;
  Vec<T, V> sum = {};
  for (int64_t e = first; e < last; e += kAhead) {
    bool begins[kAhead];
    T share[kAhead];
    Vec<T, V> row[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const bool inside = e + n < last;
      const int32_t code = inside ? lattice.pixel[e + n] : 0;
      const int64_t pixel = code < 0 ? ~code : code;
      begins[n] = code < 0 && e + n > first;
      share[n] = inside ? static_cast<T>(lattice.share[e + n]) : T{0};
      if (scaled) share[n] *= static_cast<T>(pixel_factor(p.normalize, true, lattice.norm[pixel]));
      if (in == nullptr) {
        for (int k = 0; k < V; ++k) row[n].at[k] = T{1};
      } else {
        row[n] = load_if<V>(inside, in + pixel * p.row + p.first + column);
      }
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (begins[n]) {
        store(to + column, sum);
        sum = {};
        to = table + ++vertex * p.width;
      }
      add_product(sum, share[n], row[n]);
    }
  }
  store(to + column, sum);
}

// Whether a run has the first of its vertex's heads.
__device__ inline bool begins_heads(const Lattice& lattice, int64_t run) {
  return run > 0 && lattice.pixel[run * kRun] >= 0 &&
         (lattice.first[run - 1] != lattice.first[run] || lattice.pixel[(run - 1) * kRun] < 0);
}

// Adds the heads from this run on to their vertex.
template <typename T, int V>
__device__ inline void add_heads(const Lattice& lattice, int64_t run, int64_t runs, int64_t width, T* table,
                                 const T* heads) {
  const int32_t vertex = lattice.first[run];
  Vec<T, V> sum = load<V>(table + vertex * width);
  for (; run < runs && lattice.first[run] == vertex; ++run) add(sum, load<V>(heads + run * width));
  store(table + vertex * width, sum);
}

template <typename T, int V>
__device__ inline void blur_vertex(const Lattice& lattice, int64_t axis, int64_t v, int64_t width,
                                   const T* in, T* out) {
  const int32_t* const neighbor = lattice.neighbor + 2 * (axis * lattice.vertices + v);
  const int64_t above = neighbor[0], below = neighbor[1];
  Vec<T, V> sum = load<V>(in + v * width);
  Vec<T, V> sides = load_if<V>(above < lattice.vertices, in + above * width);
  add(sides, load_if<V>(below < lattice.vertices, in + below * width));
  add_product(sum, static_cast<T>(0.5), sides);
  store(out + v * width, sum);
}

// Adds the filter's value of a pixel.
template <typename T, int V>
__device__ inline void add_slice(const LatticeStepParams& p, const Lattice& lattice, const T* table,
                                 int64_t pixel, Vec<T, V>& value) {
  const int64_t corners = p.layout.corners();
  Vec<T, V> sum = {};
#pragma unroll 3
  for (int64_t e = pixel * corners; e < (pixel + 1) * corners; ++e) {
    add_product(sum, static_cast<T>(lattice.weight[e]), load<V>(table + lattice.offset[e] * p.width));
  }
  const bool scaled = p.normalize == Normalize::symmetric || p.normalize == Normalize::after;
  const float factor = scaled ? pixel_factor(p.normalize, false, lattice.norm[pixel]) * p.gain : p.gain;
  add_product(value, static_cast<T>(factor), sum);
}

// The sum of the filters' values of a pixel.
template <typename T, int V>
__device__ inline Vec<T, V> slices(const LatticeStepsParams& steps, int64_t pixel, int column) {
  Vec<T, V> value = {};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (n >= steps.count) break;
    const LatticeStepParams& p = steps.of[n];
    const int64_t row = table_row(steps, n);
    if (row < 0) {
      value = load<V>(static_cast<const T*>(p.out) + pixel * p.row + p.first + column);
    } else {
      const T* const table = static_cast<const T*>(p.in) + row * p.width + column;
      add_slice<T, V>(p, lattice_at(p.layout, p.words), table, pixel, value);
    }
  }
  return value;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, min_blocks<T>(7))
    splat_kernel(const __grid_constant__ LatticeStepsParams steps) {
  const LatticeStepParams& p = steps.of[blockIdx.y];
  const int64_t row = table_row(steps, blockIdx.y), runs = p.layout.runs();
  const RowThread own = row_thread<V>(p.width);
  if (row < 0 || own.row >= own.rows) return;
  const Lattice lattice = lattice_at(p.layout, p.words);
  T* const table = static_cast<T*>(p.out) + row * p.width;
  for (int64_t run = int64_t{blockIdx.x} * own.rows + own.row; run < runs;
       run += int64_t{gridDim.x} * own.rows) {
    splat_run<T, V>(p, lattice, run, own.column, table, static_cast<T*>(p.heads));
  }
}

// Adds the heads to their vertices. A vertex of many runs is summed by the whole block.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    splat_heads_kernel(const __grid_constant__ LatticeStepsParams steps) {
  __shared__ Vec<T, V> sums[kThreads];
  __shared__ bool is_long[kThreads];
  const LatticeStepParams& p = steps.of[blockIdx.y];
  const RowThread own = row_thread<V>(p.width);
  const int64_t table_first = table_row(steps, blockIdx.y);
  const int runs = static_cast<int>(p.layout.runs()), stride = static_cast<int>(gridDim.x) * own.rows;
  if (table_first < 0) return;
  const Lattice lattice = lattice_at(p.layout, p.words);
  const int32_t* const first = lattice.first;
  const int64_t width = p.width;
  const T* const heads = static_cast<const T*>(p.heads) + own.column;
  T* const table = static_cast<T*>(p.out) + table_first * width + own.column;
  for (int base = static_cast<int>(blockIdx.x) * own.rows; base < runs; base += stride) {
    const int run = base + own.row;
    const bool begins = own.row < own.rows && run < runs && begins_heads(lattice, run);
    const bool many = begins && run + kShortRuns < runs && first[run + kShortRuns] == first[run];
    if (begins && !many) add_heads<T, V>(lattice, run, runs, width, table, heads);
    if (own.column == 0) is_long[own.row] = many;
    if (__syncthreads_or(many) == 0) continue;
    for (int row = 0; row < own.rows; ++row) {
      if (!is_long[row]) continue;
      const int32_t vertex = first[base + row];
      int low = base + row, high = runs;  // the end of the vertex's runs is in (low, high]
      while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (first[middle] == vertex) {
          low = middle;
        } else {
          high = middle;
        }
      }
      Vec<T, V> sum = {};
      if (own.row < own.rows) {
#pragma unroll 4
        for (int n = base + row + own.row; n < high; n += own.rows) add(sum, load<V>(heads + n * width));
      }
      sums[threadIdx.x] = sum;
      __syncthreads();
      if (own.row == 0) {
        T* const to = table + vertex * width;
        Vec<T, V> total = load<V>(to);
        for (int n = 0; n < own.rows; ++n) add(total, sums[n * own.vectors + threadIdx.x]);
        store(to, total);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

// Filters by the lattice that does not fit into the tables with the other, if so. A block has a vector of
// channels to itself, and uses the table that is free until the blur.
template <int V>
__global__ void __launch_bounds__(kOverflowThreads)
    overflow_kernel(const __grid_constant__ LatticeStepsParams steps) {
  if (table_row(steps, 0) >= 0) return;
  const LatticeStepParams& p = steps.of[0];
  const Lattice lattice = lattice_at(p.layout, p.words);
  const int64_t thread = threadIdx.x, threads = blockDim.x, runs = p.layout.runs();
  for (int64_t c = blockIdx.x * int64_t{V}; c < p.width; c += gridDim.x * int64_t{V}) {
    const int column = static_cast<int>(c);
    float* from = static_cast<float*>(steps.spare);
    float* to = from + p.layout.entries() * p.width;
    for (int64_t run = thread; run < runs; run += threads) {
      splat_run<float, V>(p, lattice, run, column, from, to);
    }
    __syncthreads();
    from += c;
    to += c;
    for (int64_t run = thread; run < runs; run += threads) {
      if (begins_heads(lattice, run)) add_heads<float, V>(lattice, run, runs, p.width, from, to);
    }
    for (int64_t axis = 0; axis < p.layout.corners(); ++axis) {
      __syncthreads();
      for (int64_t v = thread; v < lattice.vertices; v += threads) {
        blur_vertex<float, V>(lattice, axis, v, p.width, from, to);
      }
      float* const next = from;
      from = to;
      to = next;
    }
    __syncthreads();
    for (int64_t i = thread; i < p.layout.pixels; i += threads) {
      Vec<float, V> value = {};
      add_slice<float, V>(p, lattice, from, i, value);
      store(static_cast<float*>(p.out) + i * p.row + p.first + c, value);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) blur_kernel(const __grid_constant__ LatticeStepsParams steps) {
  const int64_t n = steps.begin + blockIdx.y, row = table_row(steps, n);
  const LatticeStepParams& p = steps.of[n];
  const RowThread own = row_thread<V>(p.width);
  if (row < 0 || own.row >= own.rows) return;
  const Lattice lattice = lattice_at(p.layout, p.words);
  const T* const in = static_cast<const T*>(p.in) + row * p.width + own.column;
  T* const out = static_cast<T*>(p.out) + row * p.width + own.column;
  for (int64_t v = int64_t{blockIdx.x} * own.rows + own.row; v < lattice.vertices;
       v += int64_t{gridDim.x} * own.rows) {
    blur_vertex<T, V>(lattice, p.axis, v, p.width, in, out);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) slice_kernel(const __grid_constant__ LatticeStepsParams steps) {
  const LatticeStepParams& p = steps.of[0];
  const RowThread own = row_thread<V>(p.width);
  if (own.row >= own.rows) return;
  T* const out = static_cast<T*>(p.out) + p.first + own.column;
  for (int64_t i = int64_t{blockIdx.x} * own.rows + own.row; i < p.layout.pixels;
       i += int64_t{gridDim.x} * own.rows) {
    store(out + i * p.row, slices<T, V>(steps, i, own.column));
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) rows_from_planes_kernel(const __grid_constant__ RowsParams p) {
  using Sum = typename SumOf<T>::type;
  const T* const from = static_cast<const T*>(p.from);
  for (int64_t c = blockIdx.y * int64_t{V}; c < p.channels; c += gridDim.y * int64_t{V}) {
    Sum* const to = static_cast<Sum*>(p.to) + c;
    for (int64_t i = first_item(); i < p.pixels; i += item_stride()) {
      Vec<Sum, V> value = {};
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (c + k < p.channels) value.at[k] = to_sum<Sum>(from[(c + k) * p.pixels + i]);
      }
      store(to + i * p.row, value);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) planes_from_rows_kernel(const __grid_constant__ RowsParams p) {
  using Sum = typename SumOf<T>::type;
  T* const to = static_cast<T*>(p.to);
  for (int64_t c = blockIdx.y * int64_t{V}; c < p.channels; c += gridDim.y * int64_t{V}) {
    const Sum* const from = static_cast<const Sum*>(p.from) + c;
    for (int64_t i = first_item(); i < p.pixels; i += item_stride()) {
      const Vec<Sum, V> value = load<V>(from + i * p.row);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (c + k < p.channels) to[(c + k) * p.pixels + i] = from_sum<T>(value.at[k]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) logits_kernel(const __grid_constant__ LogitsParams p) {
  const T* const scores = static_cast<const T*>(p.scores);
  for (int64_t c = blockIdx.y; c < p.channels; c += gridDim.y) {
    const bool kept = p.mask == nullptr || p.mask[c];
    for (int64_t i = first_item(); i < p.pixels; i += item_stride()) {
      const float value = static_cast<float>(to_sum<typename SumOf<T>::type>(scores[c * p.pixels + i]));
      const float logit = p.probabilities ? logf(value < 1e-5f ? 1e-5f : value) : -value;
      p.logits[c * p.pixels + i] = kept ? logit : -1e30f;
    }
  }
}

// The same for all `lanes` lanes side by side, a power of two: each has the result.
__device__ inline float lanes_max(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}
__device__ inline float lanes_sum(float v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// Slice and softmax, with a vector of channels per lane.
template <int V>
__global__ void __launch_bounds__(kThreads)
    field_slice_kernel(const __grid_constant__ LatticeStepsParams steps,
                       const __grid_constant__ SoftmaxParams p) {
  const int lane = static_cast<int>(threadIdx.x) % p.lanes, column = lane * V;
  const int own = static_cast<int>(threadIdx.x) % 32 / p.lanes;  // which of the warp's pixels
  const int64_t pixels = p.pixels, stride = item_stride() / p.lanes;
  // The lanes of a warp stay together.
  for (int64_t base = (first_item() - threadIdx.x % 32) / p.lanes; base < pixels; base += stride) {
    const int64_t i = base + own;
    const bool inside = i < pixels && column < p.row;
    Vec<float, V> value;
#pragma unroll
    for (int k = 0; k < V; ++k) value.at[k] = -3e38f;
    if (inside) {
      const Vec<float, V> filtered = slices<float, V>(steps, i, column);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (column + k >= p.channels) continue;
        value.at[k] = p.planes[(column + k) * pixels + i] + filtered.at[k];
      }
    }
    float top = value.at[0], total = 0;
#pragma unroll
    for (int k = 1; k < V; ++k) top = fmaxf(top, value.at[k]);
    top = lanes_max(top, p.lanes);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      value.at[k] = expf(value.at[k] - top);
      total += value.at[k];
    }
    total = lanes_sum(total, p.lanes);
    if (!inside) continue;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      value.at[k] /= total;
      if (p.out == nullptr && column + k < p.channels) {
        p.planes[(column + k) * pixels + i] = p.mask == nullptr || p.mask[column + k] ? value.at[k] : 0;
      }
    }
    if (p.out != nullptr) store(p.out + i * p.row + column, value);
  }
}

// Entry c of (M + M^T) / 2 times the values.
__device__ inline float mixed(const float* matrix, const float* values, int64_t c, int64_t channels) {
  const float *row = matrix + c * channels, *column = matrix + c;
  float sum = 0;
#pragma unroll 1
  for (int64_t k = 0; k < channels; ++k, column += channels) sum += 0.5f * (row[k] + *column) * values[k];
  return sum;
}

// Softmax of any number of channels: those of a lane are p.lanes apart.
__global__ void __launch_bounds__(kThreads) field_softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int own = static_cast<int>(threadIdx.x) % 32 / p.lanes;
  const int64_t stride = item_stride() / p.lanes;
  for (int64_t base = (first_item() - threadIdx.x % 32) / p.lanes; base < p.pixels; base += stride) {
    const int64_t i = base + own;
    const int64_t channels = i < p.pixels ? p.channels : 0;
    const float* const filtered = p.filtered == nullptr ? nullptr : p.filtered + i * p.row;
    float* const planes = p.planes + i;
    float* const out = p.out == nullptr ? planes : p.out + i * p.row;
    const int64_t apart = p.out == nullptr ? p.pixels : 1;
    float top = -3e38f;
    for (int64_t c = lane; c < channels; c += p.lanes) {
      float value = planes[c * p.pixels];
      if (p.compatibility != nullptr && filtered != nullptr) {
        value -= mixed(p.compatibility, filtered, c, channels);
      } else if (filtered != nullptr) {
        value += filtered[c];
      }
      out[c * apart] = value;
      top = fmaxf(top, value);
    }
    top = lanes_max(top, p.lanes);
    float sum = 0;
    for (int64_t c = lane; c < channels; c += p.lanes) {
      const float power = expf(out[c * apart] - top);
      out[c * apart] = power;
      sum += power;
    }
    sum = lanes_sum(sum, p.lanes);
    for (int64_t c = lane; c < channels; c += p.lanes) {
      const bool kept = p.out != nullptr || p.mask == nullptr || p.mask[c];
      out[c * apart] = kept ? out[c * apart] / sum : 0;
    }
  }
}

// The number of channels of a vector, as a type.
template <int V>
struct Width {
  static constexpr int value = V;
};

template <typename F>
void with_vector(int64_t vector, const F& f) {
  if (vector == 4) {
    f(Width<4>{});
  } else if (vector == 2) {
    f(Width<2>{});
  } else {
    f(Width<1>{});
  }
}

// Calls f with a value of the type of sums and with the vector's width, which is 1 in float64.
template <typename F>
void with_sum(Kind kind, int64_t vector, const F& f) {
  if (kind == Kind::f64) {
    f(double{}, Width<1>{});
  } else {
    with_vector(vector, [&](auto width) { f(float{}, width); });
  }
}

int64_t blocks_for(const LatticeStepParams& p, int64_t rows) {
  return ceil_div(rows, kThreads / (p.width / p.vector));
}

// Over vertices, whose number the host does not know: no more blocks than the device runs at once.
int64_t resident(int64_t blocks) {
  const int64_t most = current_gpu().processors * kResidentBlocks;
  return blocks < most ? blocks : most;
}

// Calls f with a value of the planes' type and with the vector's width.
template <typename F>
void with_planes(const RowsParams& p, const F& f) {
  with_type(p.kind, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), double>) {
      f(type, Width<1>{});
    } else {
      with_vector(p.vector, [&](auto width) { f(type, width); });
    }
  });
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

const char* launch_lattice_splat(const LatticeStepsParams& p, void* stream) {
  int64_t blocks = 0;
  for (int64_t n = 0; n < p.count; ++n) {
    const int64_t own = blocks_for(p.of[n], p.of[n].layout.runs());
    blocks = own > blocks ? own : blocks;
  }
  const dim3 grid = block_grid(blocks, p.count);
  with_sum(p.of[0].kind, p.of[0].vector, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int V = decltype(width)::value;
    AFA_LAUNCH((splat_kernel<T, V>), grid, kThreads, stream, p);
    AFA_LAUNCH((splat_heads_kernel<T, V>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_overflow(const LatticeStepsParams& p, void* stream) {
  const LatticeStepParams& step = p.of[0];
  with_vector(step.vector, [&](auto width) {
    AFA_LAUNCH((overflow_kernel<decltype(width)::value>), block_grid(step.width / step.vector),
               kOverflowThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_blur(const LatticeStepsParams& p, void* stream) {
  const LatticeStepParams& step = p.of[p.count - 1];
  const dim3 grid = block_grid(resident(blocks_for(step, step.layout.entries())), p.count - p.begin);
  with_sum(step.kind, step.vector, [&](auto type, auto width) {
    AFA_LAUNCH((blur_kernel<decltype(type), decltype(width)::value>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_slice(const LatticeStepsParams& p, void* stream) {
  const LatticeStepParams& step = p.of[0];
  const dim3 grid = block_grid(blocks_for(step, step.layout.pixels));
  with_sum(step.kind, step.vector, [&](auto type, auto width) {
    AFA_LAUNCH((slice_kernel<decltype(type), decltype(width)::value>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_lattice_build(const LatticeBuildParams& p, void* stream) {
  const int64_t items = p.layout.entries(), tiles = sort_tiles(items);
  const dim3 grid = block_grid(tiles);
  int32_t* const totals = p.counts + kDigits * tiles;
  int lanes = 1;
  while (lanes < tiles && lanes < 32) lanes *= 2;
  launch_simplices(p, grid_for(p.layout.pixels, 1), stream);
  int source = 0;
  const int64_t bits = 3 + p.layout.dims * key_bits(p.layout.dims);
  for (int shift = 0; shift < bits; shift += kDigitBits, source = 1 - source) {
    AFA_LAUNCH(sort_count_kernel, grid, kSortThreads, stream, p, source, shift);
    AFA_LAUNCH(scan_kernel, grid_for(kDigits * lanes, 1), kThreads, stream, p.counts, totals, kDigits, tiles,
               lanes);
    AFA_LAUNCH(sort_move_kernel, grid, kSortThreads, stream, p, source, shift);
  }
  AFA_LAUNCH(begin_count_kernel, grid, kSortThreads, stream, p, source);
  AFA_LAUNCH(scan_kernel, dim3(1), 32, stream, p.counts, totals, int64_t{1}, tiles, 32);
  AFA_LAUNCH(vertex_kernel, grid, kSortThreads, stream, p, source);
  const dim3 vertex_grid = block_grid(resident(ceil_div(items, kThreads)), p.layout.corners());
  AFA_LAUNCH(neighbor_kernel, vertex_grid, kThreads, stream, p, 1 - source);
  return launch_error();
}

const char* launch_rows_from_planes(const RowsParams& p, void* stream) {
  const dim3 grid = grid_for(p.pixels, ceil_div(p.channels, p.vector));
  with_planes(p, [&](auto type, auto width) {
    AFA_LAUNCH((rows_from_planes_kernel<decltype(type), decltype(width)::value>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_planes_from_rows(const RowsParams& p, void* stream) {
  const dim3 grid = grid_for(p.pixels, ceil_div(p.channels, p.vector));
  with_planes(p, [&](auto type, auto width) {
    AFA_LAUNCH((planes_from_rows_kernel<decltype(type), decltype(width)::value>), grid, kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_logits(const LogitsParams& p, void* stream) {
  with_type(p.kind, [&](auto type) {
    AFA_LAUNCH((logits_kernel<decltype(type)>), grid_for(p.pixels, p.channels), kThreads, stream, p);
  });
  return launch_error();
}

const char* launch_field_slice(const LatticeStepsParams& steps, const SoftmaxParams& p, void* stream) {
  with_vector(steps.of[0].vector, [&](auto width) {
    AFA_LAUNCH((field_slice_kernel<decltype(width)::value>), grid_for(p.pixels * p.lanes, 1), kThreads,
               stream, steps, p);
  });
  return launch_error();
}

const char* launch_field_softmax(const SoftmaxParams& p, void* stream) {
  AFA_LAUNCH(field_softmax_kernel, grid_for(p.pixels * p.lanes, 1), kThreads, stream, p);
  return launch_error();
}

}  // namespace afa
