#include "common/device.h"

#ifdef AFA_WITH_CUDA
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace afa {
namespace {

// Key of a query about a device: a kernel with this number of threads and bytes of shared memory or, if
// kernel is null, the attribute with this number.
struct Question {
  int device;
  const void* kernel;
  int number;
  size_t shared_bytes;
  bool operator<(const Question& other) const {
    return std::tie(device, kernel, number, shared_bytes) <
           std::tie(other.device, other.kernel, other.number, other.shared_bytes);
  }
};
std::mutex asking;
std::map<Question, int64_t> answers;

// The driver's answers don't change, and a query takes a microsecond or more, as much as a launch. `ask`
// returns a negative number if the driver fails; the query is then repeated the next time.
template <typename F>
int64_t asked_once(const Question& question, const F& ask) {
  const std::lock_guard<std::mutex> lock(asking);
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  const int64_t answer = ask();
  if (answer < 0) {
    cudaGetLastError();  // clears the error, so that it isn't reported for the next launch
    return 0;
  }
  return answers[question] = answer;
}

int current_device() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) return device;
  cudaGetLastError();
  return -1;
}

int64_t ask_attribute(int device, cudaDeviceAttr attribute) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : -1;
}

int64_t attribute(int device, cudaDeviceAttr which) {
  return asked_once({device, nullptr, which, 0}, [&] { return ask_attribute(device, which); });
}

}  // namespace

Gpu current_gpu() {
  const int device = current_device();
  if (device < 0) return {};
  return {attribute(device, cudaDevAttrMultiProcessorCount),
          attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

void allow_shared_of(const void* kernel, size_t bytes) {
  constexpr size_t kFreeBytes = 48 << 10;
  if (bytes <= kFreeBytes) return;
  // A kernel's limit is only raised: a lower one would apply to later launches that need more.
  static std::map<std::pair<int, const void*>, size_t> limits;
  const std::lock_guard<std::mutex> lock(asking);
  size_t& limit = limits[{current_device(), kernel}];
  if (bytes <= limit) return;
  const auto wanted = static_cast<int>(bytes);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted) == cudaSuccess) {
    limit = bytes;
  } else {
    cudaGetLastError();  // the launch will report it
  }
}

int64_t resident_blocks_of(const void* kernel, int threads, size_t shared_bytes) {
  allow_shared_of(kernel, shared_bytes);
  const int device = current_device();
  return asked_once({device, kernel, threads, shared_bytes}, [&]() -> int64_t {
    const int64_t cooperative = ask_attribute(device, cudaDevAttrCooperativeLaunch);
    if (cooperative <= 0) return cooperative;
    int blocks = 0;
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess)
      return -1;
    const int64_t processors = ask_attribute(device, cudaDevAttrMultiProcessorCount);
    return processors < 0 ? -1 : processors * blocks;
  });
}

}  // namespace afa
#else
namespace afa {

Gpu current_gpu() {
  return {};
}

}  // namespace afa
#endif
