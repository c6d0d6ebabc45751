// Steps of a stencil with PAR's default dilations, on CUDA.
#pragma once

#include "heuristics.h"
#include "stencil/stencil.h"

namespace afa {

// Like launch_stencil_step, but for planes [B, C, H, W] that are not grouped, with `in` and `out` wide if
// float32; between steps they are float32. float32, float16 and bfloat16; H * W, C and the number of tiles
// are below 2^31. `class_groups` is the result of ring_class_groups.
const char* launch_par_ring(const StencilParams& p, RingVariant variant, int64_t class_groups, void* stream);

}  // namespace afa
