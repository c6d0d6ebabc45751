#include "common/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Absent from CPU builds of torch: weak, so that one library loads into both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace afa {

std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

void check_shape(const Tensor& t, const char* name, const char* layout,
                 std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected = "[";
  int64_t d = 0;
  for (int64_t size : sizes) {
    same = same && (size < 0 || t.size(d) == size);
    expected += (d > 0 ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
    ++d;
  }
  AFA_CHECK(same, name, " must have shape ", layout, " = ", expected, "], got ", shape_string(t));
}

void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  AFA_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), name,
            " must be on the device of ", other_name, ", got another device");
}

void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  check_device(t, name, other, other_name);
  AFA_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the type of ", other_name, " (",
            type_name(other.scalar_type()), "), got ", type_name(t.scalar_type()));
}

Kind kind_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Kind::f32;
    case ScalarType::Double:
      return Kind::f64;
    case ScalarType::Half:
      return Kind::f16;
    case ScalarType::BFloat16:
      return Kind::bf16;
    default:
      throw_message(name, " must be float32, float64, float16 or bfloat16, got ", type_name(t.scalar_type()));
  }
}

ScalarType sum_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

Tensor empty_in_huge_pages(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor t = empty(like, sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (!t.is_cuda() && bytes >= 4 * kHugePage) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_HUGEPAGE);  // a hint: its failure changes nothing
  }
#endif
  return t;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

Tensor contiguous_as(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

CudaScope::CudaScope(const Tensor& t) {
  guard_.emplace(t.get_device_index());
  AFA_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
            "this torch has no CUDA support, so afa_ext can't be called with CUDA tensors");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
}

void check_launch(const char* error, const char* op) {
  AFA_CHECK(error == nullptr, "afa_ext::", op, ": the CUDA kernel could not be launched: ", error);
}

void built_without_cuda(const char* op) {
  throw_message("afa_ext::", op,
                ": the tensors are on a GPU, but afa_ext was built without CUDA (no nvcc was found, or "
                "AFA_EXT_CUDA=off); move the tensors to the CPU, or reinstall with nvcc on PATH");
}

}  // namespace afa
