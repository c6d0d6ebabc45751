// CUDA errors, and faults: incorrect uses of CUDA that a GPU may accept but the stand-in rejects. A fault is
// both the call's error, with its own message, and an entry of stand_in_faults().
#include <cstdarg>
#include <cstdio>
#include <utility>

#include "runtime.h"

namespace stand_in {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_fault;
thread_local cudaError_t code_of_last_fault = cudaSuccess;
thread_local std::string unfetched_launch;
std::string all_faults;

}  // namespace

std::unique_lock<std::recursive_mutex> lock() {
  static std::recursive_mutex* mutex = new std::recursive_mutex;
  return std::unique_lock<std::recursive_mutex>(*mutex);
}

cudaError_t error(cudaError_t code) {
  if (code == code_of_last_fault) code_of_last_fault = cudaSuccess;
  return last_error = code;
}

void report(const std::string& text) {
  all_faults += text + "\n";
}

cudaError_t fault(cudaError_t code, const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  last_fault = text;
  code_of_last_fault = code;
  report(last_fault);
  return last_error = code;
}

void check_that_launch_errors_were_fetched() {
  if (unfetched_launch.empty()) return;
  const std::string kernel = std::exchange(unfetched_launch, std::string());
  report("the error of the launch of " + kernel + " was never fetched");
}

void remember_launch_error(const std::string& kernel) {
  unfetched_launch = kernel;
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API cudaError_t cudaGetLastError() {
  unfetched_launch.clear();
  return std::exchange(last_error, cudaSuccess);
}

STAND_IN_API cudaError_t cudaPeekAtLastError() {
  return last_error;
}

STAND_IN_API const char* cudaGetErrorString(cudaError_t code) {
  if (code != cudaSuccess && code == code_of_last_fault) return last_fault.c_str();
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureMerge:
      return "operation would result in a merge of separate capture sequences";
    default:
      return "an error without a message in the stand-in runtime";
  }
}

STAND_IN_API const char* cudaGetErrorName(cudaError_t code) {
  static thread_local std::string name;
  name = "CUDA error " + std::to_string(static_cast<int>(code));
  return name.c_str();
}

STAND_IN_API const char* stand_in_faults() {
  static thread_local std::string text;
  const auto guard = lock();
  check_that_launch_errors_were_fetched();
  text = std::exchange(all_faults, std::string());
  last_error = cudaSuccess;
  return text.c_str();
}
