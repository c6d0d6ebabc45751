// What the pretended GPU has, for the runtime and for the kernels compiled for the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stand_in {

constexpr int kMaxDevices = 4;
constexpr size_t kDeviceBytes = size_t{8} << 30;
// Odd and few. And the least shared memory of any GPU since Ampere.
constexpr int kProcessors = 3;
constexpr int kBlocksPerProcessor = 2;
constexpr int kDefaultSharedBytes = 48 << 10;
constexpr int kMaxSharedBytes = 99 << 10;
// Device memory lies in this address range, one part per device. No double, and hardly two ints, look like it.
constexpr uintptr_t kDeviceMemory = 0x2a5b00000000;
constexpr size_t kDeviceRange = size_t{32} << 30;

}  // namespace stand_in
