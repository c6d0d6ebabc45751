// Rules that choose a CUDA kernel's variant and the division of its work from the sizes of the call and of
// the GPU. All such rules are in this file, each with its reason. No rule has been checked on a GPU yet:
// `python benchmarks/tune.py` times all variants on a GPU and compares them with the rule's choice, and
// AFA_EXT_VARIANTS overrides the rules (common/variants.h).
//
// The variants of a kernel differ only in speed: each supports every call, and falls back to another one if
// its layout does not fit.
#pragma once

#include <cstdint>

namespace afa {

// GPU properties used by the rules: streaming multiprocessors (SMs), and shared memory in bytes.
struct Gpu {
  int64_t processors = 0;
  int64_t shared_of_sm = 0;
  int64_t shared_of_block = 0;  // the most that one block may have
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A kernel lists its variants once, as X(name, ...); these macros turn the list into an enumeration and an
// array of names.
#define AFA_VARIANT_NUMBER(name, ...) name,
#define AFA_VARIANT_NAME(name, ...) #name,

// ---- par/ring.cu: PAR's default neighbors ----

// X(name, pixels per thread, whether all steps run in one cooperative launch if the device allows it)
// clang-format off
#define AFA_RING_VARIANTS(X)     \
  X(stack4,          4, false)   \
  X(stack2,          2, false)   \
  X(stack1,          1, false)   \
  X(stack4_resident, 4, true)    \
  X(stack2_resident, 2, true)    \
  X(stack1_resident, 1, true)
// clang-format on
enum class RingVariant { AFA_RING_VARIANTS(AFA_VARIANT_NUMBER) };

constexpr int ring_stack(RingVariant variant) {
#define AFA_CASE(name, stack, resident) \
  if (variant == RingVariant::name) return stack;
  AFA_RING_VARIANTS(AFA_CASE)
#undef AFA_CASE
  return 1;
}

// A thread keeps the 48 weights of each of its pixels in registers: one block per SM, two for the smallest.
constexpr int kRingTileWidth = 32;
constexpr int ring_warps(int stack) {
  return stack == 2 ? 12 : 8;
}
constexpr int ring_blocks_per_sm(int stack) {
  return stack == 1 ? 2 : 1;
}

struct RingCall {
  int64_t batch, classes, height, width, steps;
};

constexpr int64_t ring_tiles(const RingCall& call, int stack) {
  return call.batch * ceil_div(call.height, int64_t{ring_warps(stack)} * stack) *
         ceil_div(call.width, kRingTileWidth);
}

// Blocks per tile, each with a part of the classes. A single image has too few tiles for the SMs (25 tiles of
// 32 x 32 pixels at 160 x 160, for the 132 SMs of an H100), so its classes are divided, too. All blocks must
// run at once, since each of them reads the tile's weights, and every block has at least one class.
constexpr int64_t ring_class_groups(const Gpu& gpu, const RingCall& call, int stack) {
  const int64_t tiles = ring_tiles(call, stack);
  const int64_t fit = tiles > 0 ? gpu.processors * ring_blocks_per_sm(stack) / tiles : 1;
  const int64_t most = fit < 1 ? 1 : fit < call.classes ? fit : call.classes;
  return most < 2 ? 1 : ceil_div(call.classes, ceil_div(call.classes, most));
}

// The more pixels a thread has in its column, the fewer values come through shared memory per product: one
// with one pixel, 143 for 192 products with four. So the largest stack that gives work to three quarters of
// the SMs. All steps in one launch (resident): where every tile has a block, weights stay in registers over
// all steps, however many classes there are; with up to four tiles per block, a grid barrier still
// costs less than a launch (1.5 against 3 us, as docs/kernels.md predicts). Beyond that a step is too long
// for this to matter.
constexpr RingVariant ring_variant(const Gpu& gpu, const RingCall& call) {
  const RingVariant per_step[] = {RingVariant::stack4, RingVariant::stack2, RingVariant::stack1};
  const RingVariant resident[] = {RingVariant::stack4_resident, RingVariant::stack2_resident,
                                  RingVariant::stack1_resident};
  for (int i = 0; i < 3; ++i) {
    const int stack = ring_stack(per_step[i]);
    const int64_t capacity = gpu.processors * ring_blocks_per_sm(stack), tiles = ring_tiles(call, stack);
    const bool fills = 4 * tiles * ring_class_groups(gpu, call, stack) >= 3 * capacity;
    if (fills || i == 2) return call.steps > 1 && tiles <= 4 * capacity ? resident[i] : per_step[i];
  }
  return RingVariant::stack1;
}

// ---- stencil/stencil_cuda.cu: any neighbors ----

// X(name, groups of four classes per thread, whether all steps run in one cooperative launch if the device
// allows it, whether a thread then keeps its weights in shared memory). The adjoint uses at most two groups
// and does not keep weights.
// clang-format off
#define AFA_STENCIL_VARIANTS(X)               \
  X(classes4,          1, false, false)       \
  X(classes8,          2, false, false)       \
  X(classes12,         3, false, false)       \
  X(classes4_resident, 1, true,  false)       \
  X(classes4_kept,     1, true,  true)
// clang-format on
enum class StencilVariant { AFA_STENCIL_VARIANTS(AFA_VARIANT_NUMBER) };

constexpr int kStencilThreads = 128;
// Blocks per SM with one, two and three groups of classes per thread, as limited by registers.
constexpr int stencil_blocks_per_sm(int groups) {
  return groups == 1 ? 5 : groups == 2 ? 4 : 3;
}

// Short steps are limited by launches, and IRN's walk (69 neighbors, 256 steps) by reading the weights in
// every step. If all threads can run at once, one launch runs all steps, and the weights (35 KB per block)
// stay in shared memory if they fit. Longer steps are limited by reading weights, too: with eight classes per
// thread they are read half as often; twelve leave too few warps to hide the reads.
constexpr StencilVariant stencil_variant(const Gpu& gpu, int64_t batch, int64_t classes, int64_t pixels,
                                         int64_t steps) {
  const int64_t columns = ceil_div(pixels, kStencilThreads);
  const int64_t blocks4 = columns * batch * ceil_div(classes, 4);
  if (steps > 1 && blocks4 <= gpu.processors * stencil_blocks_per_sm(1)) return StencilVariant::classes4_kept;
  const int64_t blocks8 = columns * batch * ceil_div(classes, 8);
  return blocks8 >= gpu.processors * stencil_blocks_per_sm(2) ? StencilVariant::classes8
                                                              : StencilVariant::classes4;
}

// ---- walk/step.cu, walk/transition.cu ----

// X(name, maximum threads per block; 0: one thread per target, without tiles)
// clang-format off
#define AFA_WALK_STEP_VARIANTS(X) \
  X(by_target, 0)                 \
  X(tiled128,  128)               \
  X(tiled160,  160)               \
  X(tiled224,  224)
// clang-format on
enum class WalkStepVariant { AFA_WALK_STEP_VARIANTS(AFA_VARIANT_NUMBER) };

// More threads stage more rows of sources at a time, and need fewer barriers. If shared memory is small, a
// block uses only the rows that fit, and the threads for these rows.
constexpr WalkStepVariant walk_step_variant() {
  return WalkStepVariant::tiled224;
}

// Shared memory of a block: a third of the SM's if that is large (A100 163 KB, H100 227 KB), half of it on
// GeForce (99 KB), so that other blocks compute while one stages. The runtime reserves 1 KB for each block.
constexpr int64_t walk_tile_bytes(const Gpu& gpu) {
  const int64_t share = gpu.shared_of_sm / (gpu.shared_of_sm > (128 << 10) ? 3 : 2) - (1 << 10);
  return share < gpu.shared_of_block ? share : gpu.shared_of_block;
}

// ---- affinity: the weighted sum of attention maps ----

// X(name, maps read ahead)
// clang-format off
#define AFA_AFFINITY_VARIANTS(X) \
  X(maps1, 1)                    \
  X(maps2, 2)                    \
  X(maps4, 4)
// clang-format on
enum class AffinityVariant { AFA_AFFINITY_VARIANTS(AFA_VARIANT_NUMBER) };

// Reading two maps ahead keeps 64 bytes per thread in flight, about what an H100 needs to saturate its memory
// (3.35 TB/s times 0.6 us is 15 KB per SM); four maps need more registers, which costs warps.
constexpr AffinityVariant affinity_variant() {
  return AffinityVariant::maps2;
}

}  // namespace afa
