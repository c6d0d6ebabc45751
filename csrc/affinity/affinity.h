// Affinity learned from attention (AFA, CVPR 2022): A = sigmoid(sum_k weight_k (S_k + S_k^T) + bias), its
// labels and its loss.
//
// Pairs of nodes are stored dense, [B, N, N], or windowed, [B, N, (2*radius+1)^2]: entry [b, i, k] is the
// pair of node i and node i + offset k, with offsets in row-major order from (-radius, -radius).
#pragma once

#include <cstdint>

#include "common/geometry.h"
#include "common/simd.h"
#include "heuristics.h"

namespace afa {

// Pairs are labeled with their group: 0 different classes, 1 same class, 2 same foreground class. The error
// of a pair is A in group 0 and 1 - A in the others. All other labels are ignored.
constexpr int kPairGroups = 3;
constexpr int64_t kLossSums = 1 + 3 * kPairGroups;

struct PairLayout {
  int64_t batch = 0, height = 0, width = 0;
  int64_t radius = -1;    // Chebyshev, in nodes; below 0: all pairs
  bool windowed = false;  // storage; a dense one may have a radius too, and is empty outside the window then
};

struct AffinityParams {
  PairLayout pairs;
  Kind kind =
      Kind::f32;  // of attention, affinity and their gradients; sums are float64 for float64, else float32
  int64_t maps = 0;
  const void* attention = nullptr;  // [B, K, N, N] contiguous
  const void* weight = nullptr;     // [K] in the type of sums
  const void* bias = nullptr;       // [1] in the type of sums
  void* mixed = nullptr;  // CPU: sum_k weight_k S_k stored as pairs, in the type of sums; may be `affinity`
  void* affinity = nullptr;        // pairs; an input of the backward passes
  const void* grad = nullptr;      // pairs: gradient of affinity
  void* grad_attention = nullptr;  // [B, K, N, N] contiguous
  void* partial =
      nullptr;  // [parts, K + 1] sums towards the gradients of weight and bias, in the type of sums
  void* grad_weight = nullptr;   // CUDA: [K + 1], the sums of `partial`
  AffinityVariant variant = {};  // CUDA, forward
};

struct AffinityLabelParams {
  PairLayout pairs;
  int64_t ignore = 255;
  bool split = false;  // label pairs of the same foreground class 2 instead of 1
  int64_t background = 0;
  const int64_t* tokens = nullptr;  // [B, h, w]
  uint8_t* labels = nullptr;        // pairs: 0 different, 1 same, 2 same foreground class, 255 ignored
};

struct AffinityLossParams {
  Kind kind = Kind::f32;  // forward: of affinity; backward: of both gradients
  int64_t count = 0;
  const void* affinity = nullptr;   // [count]
  const uint8_t* labels = nullptr;  // [count]
  double weight[kPairGroups] = {};  // of the groups' means in the loss
  const int64_t* counts = nullptr;  // [kPairGroups], the pairs to divide by; null: those of this call
  double* partial = nullptr;        // [blocks, 2 * kPairGroups]: errors of each group, pairs of each group
  void* sums = nullptr;             // [kLossSums], in the type of sums: see finish_loss
  const void* grad = nullptr;       // [kLossSums]; only the first is used
  void* grad_affinity = nullptr;
};

namespace {  // one copy for each file: see geometry.h

constexpr int64_t kAffinityRows = 16;             // rows of attention per CPU task
constexpr int64_t kAffinityTile = 32;             // side of a tile of pairs, nodes
constexpr int64_t kAffinityGroup = 16;            // maps whose gradients a CUDA block sums together
constexpr int64_t kTilesOfPart = 4;               // pairs of tiles, as above
constexpr int64_t kLossBlock = int64_t{1} << 14;  // pairs that are summed together, for any number of threads

AFA_HOST_DEVICE inline int64_t nodes_of(const PairLayout& p) {
  return p.height * p.width;
}
AFA_HOST_DEVICE inline int64_t window_of(const PairLayout& p) {
  return (2 * p.radius + 1) * (2 * p.radius + 1);
}
AFA_HOST_DEVICE inline int64_t pairs_of_node(const PairLayout& p) {
  return p.windowed ? window_of(p) : nodes_of(p);
}

AFA_HOST_DEVICE inline uint8_t pair_label(const AffinityLabelParams& p, int64_t a, int64_t b) {
  if (a != b) return 0;
  return p.split && a != p.background ? 2 : 1;
}

// From the total errors and numbers of pairs of the groups, writes: the loss, its derivative with respect to
// the entries of each group, the errors, the numbers of pairs.
template <typename S>
AFA_HOST_DEVICE inline void finish_loss(const AffinityLossParams& p, const double* total, S* out) {
  double loss = 0;
  for (int g = 0; g < kPairGroups; ++g) {
    const double own = total[kPairGroups + g], count = p.counts ? static_cast<double>(p.counts[g]) : own;
    const double factor = p.weight[g] / (count + 1);
    loss += factor * total[g];
    out[1 + g] = static_cast<S>(g == 0 ? factor : -factor);
    out[1 + kPairGroups + g] = static_cast<S>(total[g]);
    out[1 + 2 * kPairGroups + g] = static_cast<S>(own);
  }
  out[0] = static_cast<S>(loss);
}

AFA_HOST_DEVICE inline int64_t tiles_of(const PairLayout& p) {
  return (nodes_of(p) + kAffinityTile - 1) / kAffinityTile;
}
AFA_HOST_DEVICE inline int64_t blocks_of(const PairLayout& p) {
  return (nodes_of(p) + kAffinityRows - 1) / kAffinityRows;
}

// CUDA: an image's pairs of tiles (row <= column), and those of them that may overlap the window, up to
// tile_reach_of tiles beyond the diagonal.
AFA_HOST_DEVICE inline int64_t tile_pairs_of(const PairLayout& p) {
  return tiles_of(p) * (tiles_of(p) + 1) / 2;
}
AFA_HOST_DEVICE inline int64_t tile_reach_of(const PairLayout& p) {
  const int64_t reach = (p.radius * (p.width + 1) + kAffinityTile - 1) / kAffinityTile;
  return reach < tiles_of(p) ? reach : tiles_of(p) - 1;
}
AFA_HOST_DEVICE inline int64_t near_tile_pairs_of(const PairLayout& p) {
  return p.radius < 0 ? tile_pairs_of(p) : tiles_of(p) * (tile_reach_of(p) + 1);
}
AFA_HOST_DEVICE inline int64_t weight_parts_of(const PairLayout& p) {
  return (p.batch * near_tile_pairs_of(p) + kTilesOfPart - 1) / kTilesOfPart;
}

// Index of pair (i, j) in its image's pairs; -1 outside the window.
AFA_HOST_DEVICE inline int64_t pair_index(const PairLayout& p, int64_t i, int64_t j) {
  if (p.radius < 0) return i * nodes_of(p) + j;
  const int64_t dy = j / p.width - i / p.width, dx = j % p.width - i % p.width;
  if (dy < -p.radius || dy > p.radius || dx < -p.radius || dx > p.radius) return -1;
  return p.windowed ? i * window_of(p) + (dy + p.radius) * (2 * p.radius + 1) + dx + p.radius
                    : i * nodes_of(p) + j;
}

// Stride of the rows in a CPU task's scratch: not a power of two, so that a column's entries don't share a
// cache set.
inline int64_t scratch_stride(const PairLayout& p) {
  return nodes_of(p) + kAffinityRows;
}

}  // namespace

// `scratch` has kAffinityRows rows of scratch_stride(pairs) sums. Items are the B * N rows; for dense
// sigmoid, B * ceil(tiles / 2); for backward, blocks of kAffinityRows rows, each with its part of `partial`.
AFA_SIMD_DECLARE(void affinity_mix_rows(const AffinityParams& p, int64_t begin, int64_t end, void* scratch))
AFA_SIMD_DECLARE(void affinity_sigmoid_items(const AffinityParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void affinity_backward_attention_blocks(const AffinityParams& p, int64_t begin, int64_t end,
                                                         void* scratch))
AFA_SIMD_DECLARE(void affinity_backward_weight_blocks(const AffinityParams& p, int64_t begin, int64_t end,
                                                      void* scratch))
AFA_SIMD_DECLARE(void affinity_label_rows(const AffinityLabelParams& p, int64_t begin, int64_t end))
// Blocks of kLossBlock pairs.
AFA_SIMD_DECLARE(void affinity_loss_blocks(const AffinityLossParams& p, int64_t begin, int64_t end))
AFA_SIMD_DECLARE(void affinity_loss_backward_blocks(const AffinityLossParams& p, int64_t begin, int64_t end))

// With a radius, the caller must set `affinity` to zero first.
const char* launch_affinity(const AffinityParams& p, void* stream);
const char* launch_affinity_backward_attention(const AffinityParams& p, void* stream);
// weight_parts_of(pairs) parts.
const char* launch_affinity_backward_weight(const AffinityParams& p, void* stream);
const char* launch_affinity_labels(const AffinityLabelParams& p, void* stream);
const char* launch_affinity_loss(const AffinityLossParams& p, void* stream);
const char* launch_affinity_loss_backward(const AffinityLossParams& p, void* stream);

}  // namespace afa
