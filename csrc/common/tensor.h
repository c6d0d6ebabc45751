// What the host side of every operator needs of torch, through its stable ABI: checks, types, allocation,
// the device guard with the stream, and loops over torch's own threads.
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

// Throws what Python sees as a RuntimeError; the message is the parts alone (torch's own macro puts the
// source file's path in front).
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

// Checks the number of dimensions and each size; -1 accepts any. `layout` is how the error names the shape.
void check_shape(const Tensor& t, const char* name, const char* layout, std::initializer_list<int64_t> sizes);
void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name);
// Checks that t lies on the device of `other` and has its type.
void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name);
// The type as the kernels know it; an error that names the argument if they don't.
Kind kind_of(const Tensor& t, const char* name);

// The type sums are formed in: float64 for float64, float32 for all others.
ScalarType sum_type(const Tensor& t);
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
// The same, and on the CPU, where the system gives them on request, in pages of 2 MiB: a large tensor is
// fresh memory each time, and a fault for each 4 KiB of it costs several times what writing it does.
Tensor empty_in_huge_pages(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);
// A contiguous tensor of this type; t itself where it is one already.
Tensor contiguous_as(const Tensor& t, ScalarType type);

// While it lives, this thread takes denormal numbers as 0 (x86). A multiply-add with one takes over a hundred
// cycles, and softmax weights of far neighbors are denormal in half a percent of PAR's cases: that doubled
// its time. What is lost is under 1.2e-38.
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

// Makes the tensor's device current for this scope, and gives torch's current stream on it as a handle.
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
#define AFA_CUDA_LAUNCH(op, call) ::afa::built_without_cuda(op)
#endif

}  // namespace afa
