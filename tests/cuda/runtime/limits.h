// What the pretended GPU has, for the runtime and for the kernels compiled for the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stand_in {

constexpr int kMaxDevices = 4;
constexpr size_t kDeviceBytes = size_t{3} << 30;
// Odd and few. And the least shared memory of any GPU since Ampere.
constexpr int kProcessors = 3;
constexpr int kBlocksPerProcessor = 2;
constexpr int kDefaultSharedBytes = 48 << 10;
constexpr int kMaxSharedBytes = 99 << 10;
// Device memory lies in this address range, one part per device. No double, and hardly two ints, look like
// it.
constexpr uintptr_t kDeviceMemory = 0x2a5b00000000;
constexpr size_t kDeviceRange = size_t{4} << 30;
constexpr size_t kDeviceStart = size_t{1} << 24;  // unused: launches.cpp says why

}  // namespace stand_in
