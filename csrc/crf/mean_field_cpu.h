// The mean field of a dense CRF on the CPU: the kernel that is compiled once per SIMD level.
#pragma once

#include "crf/lattice_cpu.h"

namespace afa {

constexpr int kMaxKernels = 2;

// An iteration on pixels: slices both kernels' tables, adds the logits, takes the softmax, and splats the
// probabilities at once, for the next iteration; so they are never stored. The two lattices are used as one:
// their tables, the rows of a block and the corners of a pixel follow each other.
struct FieldParams {
  int64_t pixels = 0, channels = 0;      // channels: the classes used
  int64_t row = 0;                       // channels, padded to chunks
  int64_t corners = 0;                   // of both lattices together
  const uint16_t* local = nullptr;       // [N, corners]: the row of a corner, from its block's first row
  const float* share = nullptr;          // [N, corners]: weights, normalized
  const int32_t* block = nullptr;        // [blocks + 1]: first row of each block
  const int32_t* vertex = nullptr;       // [rows]: the row of the table
  const float* table = nullptr;          // [vertices, row]; null in the first step, which has the logits only
  float* rows = nullptr;                 // [rows, row]: splatted probabilities; null in the last step, which
  float* planes = nullptr;               // writes the probabilities to planes [all classes, N]
  const GatherParams* gather = nullptr;  // in the first step: where the logits come from
  float* logits = nullptr;               // [N, row]
  const float* compatibility = nullptr;  // [channels, row], or null for Potts
  const int32_t* order = nullptr;
  const int32_t* index = nullptr;  // [channels]: the plane of each class
};

// Blocks of kBlock pixels. scratch: [kPixelBlock + 1 + max_rows, row], max_rows of the largest block.
AFA_SIMD_DECLARE(void field_step(const FieldParams& p, int64_t begin, int64_t end, float* scratch))

}  // namespace afa
