// The parts of torch used by the host code of all operators, through its stable ABI: checks, types,
// allocation, the device guard with the stream, and loops on torch's thread pool.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/geometry.h"

namespace afa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws an exception that Python sees as a RuntimeError; the message consists only of the parts (torch's
// macro prepends the path of the source file).
#define AFA_CHECK(condition, ...)                        \
  do {                                                   \
    if (!(condition)) ::afa::throw_message(__VA_ARGS__); \
  } while (0)

template <typename... Parts>
[[noreturn]] void throw_message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_string(const Tensor& t);
const char* type_name(ScalarType type);

// Checks the number of dimensions and each size; -1 accepts any. `layout` is the shape in the error message.
void check_shape(const Tensor& t, const char* name, const char* layout, std::initializer_list<int64_t> sizes);
void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name);
// Checks that t has the device and the type of `other`.
void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name);
// The type for the kernels; throws an error with the argument's name if it is not supported.
Kind kind_of(const Tensor& t, const char* name);

// The accumulation type: float64 for float64, float32 for all others.
ScalarType sum_type(const Tensor& t);
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
// The same, and on the CPU in pages of 2 MiB if the system supports it: a large tensor is new memory each
// time, and a page fault for every 4 KiB costs several times as much as writing to it.
Tensor empty_in_huge_pages(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
// A contiguous tensor of this type; t itself if it already is one.
Tensor contiguous_as(const Tensor& t, ScalarType type);

// During its lifetime, this thread flushes denormal numbers to 0 (x86). A multiply-add with a denormal takes
// over a hundred cycles, and half a percent of PAR's softmax weights, those of distant neighbors, are
// denormal: that doubled its time. The error is below 1.2e-38.
class FlushDenormals {
 public:
#ifdef __SSE2__
  FlushDenormals() { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  const unsigned saved_ = _mm_getcsr();
#else
  FlushDenormals() {}

 private:
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Runs on torch's thread pool; f(begin, end). `work` is the rough cost of one item in multiply-adds.
template <typename F>
void parallel_rows(int64_t items, int64_t work, const F& f) {
  constexpr int64_t kWorkPerTask = 1 << 16;
  const int64_t grain = work >= kWorkPerTask ? 1 : kWorkPerTask / (work > 0 ? work : 1);
  torch::stable::parallel_for(0, items, grain, [&f](int64_t begin, int64_t end) {
    const FlushDenormals scope;
    f(begin, end);
  });
}

// Makes the tensor's device current for this scope, and returns torch's current stream on it as a handle.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t);
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Every CUDA launcher returns nullptr, or the runtime's message.
void check_launch(const char* error, const char* op);
[[noreturn]] void built_without_cuda(const char* op);

#ifdef AFA_WITH_CUDA
#define AFA_CUDA_LAUNCH(op, call) ::afa::check_launch(call, op)
#else
// The call is only read, not made, so that its arguments count as used.
#define AFA_CUDA_LAUNCH(op, call) (static_cast<void>(sizeof(call)), ::afa::built_without_cuda(op))
#endif

}  // namespace afa
