#include "common/device.h"

#ifdef AFA_WITH_CUDA
#include <cuda_runtime_api.h>

#include <atomic>

namespace afa {
namespace {

int architecture_of(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();  // so that the next launch isn't blamed
    return 0;
  }
  return 10 * major + minor;
}

}  // namespace

int current_architecture() {
  constexpr int kRemembered = 64;
  static std::atomic<int> known[kRemembered];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  if (device >= kRemembered) return architecture_of(device);
  int architecture = known[device].load(std::memory_order_relaxed);
  if (architecture == 0) {
    architecture = architecture_of(device);
    known[device].store(architecture, std::memory_order_relaxed);
  }
  return architecture;
}

}  // namespace afa
#else
namespace afa {

int current_architecture() {
  return 0;
}

}  // namespace afa
#endif
