// What the host asks of the current CUDA device, each answer remembered by device and kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heuristics.h"

namespace afa {

// What heuristics.h knows of it; zeros where there is no device, as in a CPU build.
Gpu current_gpu();

// Only in builds with CUDA:
// The most shared memory that one block may have, in bytes.
int64_t shared_bytes_of_block();
// Lets a kernel be launched with this much dynamic shared memory, for which beyond 48 KiB it has to be asked.
void allow_shared_of(const void* kernel, size_t bytes);
// How many blocks of a kernel the device runs at once in a cooperative launch; 0 if not one fits, or if it
// has no such launches.
int64_t resident_blocks_of(const void* kernel, int threads, size_t shared_bytes);

}  // namespace afa
