#pragma once

namespace afa {

// The compute capability of the current CUDA device, 90 for 9.0; 0 where there is none, as in a CPU build.
int current_architecture();

}  // namespace afa
