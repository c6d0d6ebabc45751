#include "common/device.h"

#ifdef AFA_WITH_CUDA
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>

namespace afa {
namespace {

// A question about a kernel, or, without one, an attribute of the device.
struct Question {
  int device;
  const void* kernel;
  int number;  // the attribute, or the threads of a block
  size_t shared_bytes;
  bool operator<(const Question& other) const {
    return std::tie(device, kernel, number, shared_bytes) <
           std::tie(other.device, other.kernel, other.number, other.shared_bytes);
  }
};

// The driver's answers don't change, and a question costs a microsecond or more, as much as a launch.
template <typename F>
int64_t asked_once(const Question& question, const F& ask) {
  static std::mutex writing;
  static std::map<Question, int64_t> answers;
  const std::lock_guard<std::mutex> lock(writing);
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  const int64_t answer = ask();
  return answers[question] = answer;
}

int current_device() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) return device;
  cudaGetLastError();  // so that the next launch isn't blamed
  return -1;
}

int64_t attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  if (device >= 0 && cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return value;
}

int64_t attribute(cudaDeviceAttr which) {
  const int device = current_device();
  const auto ask = [&] { return attribute_of(device, which); };
  return device < 0 ? 0 : asked_once({device, nullptr, static_cast<int>(which), 0}, ask);
}

}  // namespace

int current_architecture() {
  return static_cast<int>(10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                          attribute(cudaDevAttrComputeCapabilityMinor));
}

int64_t shared_bytes_of_sm() {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

int64_t shared_bytes_of_block() {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

void allow_shared_of(const void* kernel, size_t bytes) {
  constexpr size_t kFreeBytes = 48 << 10;
  if (bytes <= kFreeBytes) return;
  asked_once({current_device(), kernel, -1, bytes}, [&]() -> int64_t {
    // A failure is left for the launch to report.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes)) == cudaSuccess;
  });
}

int64_t resident_blocks_of(const void* kernel, int threads, size_t shared_bytes) {
  allow_shared_of(kernel, shared_bytes);
  const int64_t cooperative = attribute(cudaDevAttrCooperativeLaunch);
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount);
  if (cooperative == 0) return 0;
  return processors * asked_once({current_device(), kernel, threads, shared_bytes}, [&]() -> int64_t {
           int blocks = 0;
           cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
           return blocks;
         });
}

}  // namespace afa
#else
namespace afa {

int current_architecture() {
  return 0;
}

}  // namespace afa
#endif
