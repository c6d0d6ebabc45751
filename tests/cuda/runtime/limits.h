// Limits of the simulated GPU, for the runtime and for the host-compiled kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stand_in {

constexpr int kMaxDevices = 4;
constexpr size_t kDeviceBytes = size_t{3} << 30;
// Few multiprocessors, and the smallest shared memory of any GPU since Ampere.
constexpr int kProcessors = 3;
constexpr int kBlocksPerProcessor = 2;
constexpr int kDefaultSharedBytes = 48 << 10;
constexpr int kMaxSharedBytes = 99 << 10;
// Device memory is in this address range, one part per device. No double, and hardly any pair of ints, looks
// like such an address.
constexpr uintptr_t kDeviceMemory = 0x2a5b00000000;
constexpr size_t kDeviceRange = size_t{4} << 30;
constexpr size_t kDeviceStart = size_t{1} << 24;  // unused; see looks_like_a_pointer in launches.cpp

}  // namespace stand_in
