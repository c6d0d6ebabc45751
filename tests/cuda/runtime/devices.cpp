// The simulated devices: two, or AFA_STAND_IN_DEVICES. They are small, so that small inputs already execute
// the kernels' grid-stride loops. AFA_STAND_IN_PROCESSORS and AFA_STAND_IN_SHARED_BYTES simulate larger ones.
// Each host thread has its own current device.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "limits.h"
#include "runtime.h"

namespace stand_in {
namespace {

thread_local int current = 0;
int refused_cooperative = 0;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

int attribute(cudaDeviceAttr which, bool& known) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      return 8;
    case cudaDevAttrComputeCapabilityMinor:
      return 6;
    case cudaDevAttrMultiProcessorCount:
      return processors();
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return max_shared_bytes();
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kDefaultSharedBytes;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return max_shared_bytes() + 1024;
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 1536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrCooperativeLaunch:
      return refused_cooperative == 1 ? 0 : 1;
    case cudaDevAttrL2CacheSize:
      return 6 << 20;
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrHostNativeAtomicSupported:
      return 0;
    default:
      known = false;
      return 0;
  }
}

}  // namespace

int device_count() {
  static const int count = std::clamp(setting("AFA_STAND_IN_DEVICES", 2), 1, kMaxDevices);
  return count;
}

int processors() {
  static const int count = setting("AFA_STAND_IN_PROCESSORS", kProcessors);
  return count;
}

int max_shared_bytes() {
  static const int bytes = setting("AFA_STAND_IN_SHARED_BYTES", kMaxSharedBytes);
  return bytes;
}

int current_device() {
  return current;
}

int refused() {
  return refused_cooperative;
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API void stand_in_refuse_cooperative(int how) {
  refused_cooperative = how;
}

STAND_IN_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return error(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= device_count()) return error(cudaErrorInvalidDevice);
  bool known = true;
  *value = attribute(which, known);
  const auto guard = lock();
  return known ? cudaSuccess
               : fault(cudaErrorNotSupported, "the stand-in runtime does not implement device attribute %d",
                       which);
}

STAND_IN_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= device_count()) return error(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "stand-in GPU");
  bool known = true;
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor, known);
  properties->minor = attribute(cudaDevAttrComputeCapabilityMinor, known);
  properties->multiProcessorCount = processors();
  properties->totalGlobalMem = kDeviceBytes;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 1536;
  properties->sharedMemPerBlock = kDefaultSharedBytes;
  properties->sharedMemPerBlockOptin = max_shared_bytes();
  properties->sharedMemPerMultiprocessor = max_shared_bytes() + 1024;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->l2CacheSize = 6 << 20;
  properties->cooperativeLaunch = refused_cooperative != 1;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}

// No peer access: torch then copies between devices through contiguous temporaries, as on most machines.
STAND_IN_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                                          unsigned long long,
                                                          cudaDriverEntryPointQueryResult* result) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver == nullptr ? nullptr : dlsym(driver, symbol);
  if (result != nullptr)
    *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  const auto guard = lock();
  return *function == nullptr
             ? fault(cudaErrorSymbolNotFound, "the stand-in driver does not implement %s", symbol)
             : cudaSuccess;
}
