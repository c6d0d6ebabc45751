// affinity_labels: 1 if two tokens have the same class (2 if it is not the background, with a background), 0
// if they have different classes, 255 if ignored.
//
// Threads: a thread owns 16 consecutive labels, or one label if a node has fewer pairs or the tensor is not
// aligned to 16 bytes. Reads: tokens [B, h, w]. Writes: labels, as pairs, in vectors of 16 bytes. Slower: a
// division per label, and a branch per token, which serializes the reads.
#include <type_traits>

#include "affinity/affinity.h"
#include "common/cuda.cuh"
#include "common/vectors.cuh"

namespace afa {
namespace {

constexpr int kLabels = 16;  // per thread

// Node numbers below this limit are stored in 32 bits.
#ifdef AFA_CUDA_ON_HOST
constexpr int64_t kNarrow = 60;
#else
constexpr int64_t kNarrow = int64_t{1} << 31;
#endif

// 0 <= i < end, in one comparison.
template <typename Index>
__device__ inline bool within(Index i, Index end) {
  return static_cast<std::make_unsigned_t<Index>>(i) < static_cast<std::make_unsigned_t<Index>>(end);
}

// A thread writes L consecutive labels: those of one node's pairs and, after its last pair, those of the next
// node. Only the first label's pair is computed by division. All tokens are read without branches (the
// image's first token if there is none), so that the reads are independent. Index is the type of a node's
// number; with L > 1 a node has at least L pairs.
template <typename Index, bool kWindowed, int L>
__global__ void __launch_bounds__(kThreads) labels_kernel(const __grid_constant__ AffinityLabelParams p) {
  const PairLayout& pairs = p.pairs;
  const Index height = static_cast<Index>(pairs.height), width = static_cast<Index>(pairs.width);
  const Index radius = static_cast<Index>(pairs.radius), side = 2 * radius + 1;
  const Index rows = kWindowed ? side : height, columns = kWindowed ? side : width;  // of a node's pairs
  const int64_t nodes = nodes_of(pairs), size = pairs_of_node(pairs), count = pairs.batch * nodes * size;
  for (int64_t item = first_item() * L; item < count; item += item_stride() * L) {
    const int64_t line = item / size, b = line / nodes;
    const Index node = static_cast<Index>(line - b * nodes), entry = static_cast<Index>(item - line * size);
    const int64_t* tokens = p.tokens + b * nodes;
    Index y = node / width, x = node - y * width;
    Index row = entry / columns, column = entry - row * columns;
    const Index next_x = x + 1 < width ? x + 1 : 0, below = next_x > 0 ? y : y + 1;
    const Index next_y = below < height ? below : 0;
    const bool last = line + 1 == pairs.batch * nodes, new_image = next_x == 0 && next_y == 0;
    const int64_t* next_tokens = new_image && !last ? tokens + nodes : tokens;
    int64_t own = tokens[node];
    const int64_t next_own = next_tokens[next_y * width + next_x];
    int64_t to[L], from[L];
    bool in[L];
#pragma unroll
    for (int n = 0; n < L; ++n) {
      const Index to_y = kWindowed ? y + row - radius : row, to_x = kWindowed ? x + column - radius : column;
      in[n] = kWindowed ? within(to_y, height) && within(to_x, width)
                        : within(to_y - y + radius, side) && within(to_x - x + radius, side);
      to[n] = tokens[in[n] ? to_y * width + to_x : 0];
      from[n] = own;
      ++column;
      const bool end_of_row = column == columns;
      column = end_of_row ? 0 : column;
      row += end_of_row ? 1 : 0;
      const bool end = row == rows;
      row = end ? 0 : row;
      y = end ? next_y : y;
      x = end ? next_x : x;
      own = end ? next_own : own;
      tokens = end ? next_tokens : tokens;
    }
    Vec<uint8_t, L> labels;
#pragma unroll
    for (int n = 0; n < L; ++n) {
      const bool counts = in[n] && from[n] != p.ignore && to[n] != p.ignore;
      labels.at[n] = counts ? pair_label(p, from[n], to[n]) : 255;
    }
    if (item + L <= count) {
      store(p.labels + item, labels);
    } else {
#pragma unroll
      for (int n = 0; n < L; ++n) {
        if (item + n < count) p.labels[item + n] = labels.at[n];
      }
    }
  }
}

}  // namespace

const char* launch_affinity_labels(const AffinityLabelParams& p, void* stream) {
  const int64_t size = pairs_of_node(p.pairs), labels = p.pairs.batch * nodes_of(p.pairs) * size;
  auto launch = [&](auto index, auto windowed) {
    using Index = decltype(index);
    constexpr bool kWindowed = decltype(windowed)::value;
    if (size >= kLabels && aligned(p.labels)) {
      AFA_LAUNCH((labels_kernel<Index, kWindowed, kLabels>), grid_for(ceil_div(labels, kLabels), 1), kThreads,
                 stream, p);
    } else {
      AFA_LAUNCH((labels_kernel<Index, kWindowed, 1>), grid_for(labels, 1), kThreads, stream, p);
    }
  };
  auto with_layout = [&](auto index) {
    p.pairs.windowed ? launch(index, Flag<true>{}) : launch(index, Flag<false>{});
  };
  nodes_of(p.pairs) < kNarrow ? with_layout(int32_t{}) : with_layout(int64_t{});
  return launch_error();
}

}  // namespace afa
