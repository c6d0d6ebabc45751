// Queries about the current CUDA device; answers are cached by device and kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heuristics.h"

namespace afa {

// The properties used by heuristics.h; zeros if there is no device, as in a CPU build.
Gpu current_gpu();

// Only in builds with CUDA:
// Allows launches of a kernel with this much dynamic shared memory; required above 48 KiB.
void allow_shared_of(const void* kernel, size_t bytes);
// The number of blocks of a kernel that the device can run at once in a cooperative launch; 0 if none fits,
// or if the device does not support such launches.
int64_t resident_blocks_of(const void* kernel, int threads, size_t shared_bytes);

}  // namespace afa
