// Prints what csrc/heuristics.h chooses, for test_heuristics.py. Arguments: SMs, shared memory of an SM and
// of a block, then batch, classes, height, width, steps.
#include "heuristics.h"

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  int64_t n[8] = {};
  if (count != 9) return 1;
  for (int i = 0; i < 8; ++i) n[i] = std::atoll(arguments[i + 1]);
  const afa::Gpu gpu{n[0], n[1], n[2]};
  const afa::RingCall call{n[3], n[4], n[5], n[6], n[7]};
  const char* const rings[] = {AFA_RING_VARIANTS(AFA_VARIANT_NAME)};
  const char* const stencils[] = {AFA_STENCIL_VARIANTS(AFA_VARIANT_NAME)};
  const afa::RingVariant ring = afa::ring_variant(gpu, call);
  const int stack = afa::ring_stack(ring);
  const afa::StencilVariant stencil = afa::stencil_variant(gpu, n[3], n[4], n[5] * n[6], n[7]);
  std::printf("%s %lld %lld %s %lld\n", rings[static_cast<int>(ring)],
              static_cast<long long>(afa::ring_tiles(call, stack)),
              static_cast<long long>(afa::ring_class_groups(gpu, call, stack)),
              stencils[static_cast<int>(stencil)], static_cast<long long>(afa::walk_tile_bytes(gpu)));
  return 0;
}
