// Real values for torch's own operators on CUDA tensors. Every operator that has a CUDA kernel is overridden.
// Its CPU kernel computes on CPU tensors that share the memory of the CUDA tensors. The results are enqueued
// on the current stream and are written when the stream runs. Before an operator reads its inputs, the work
// on its own stream runs, including the work that this stream waits for, and no other work. So a missing wait
// between streams reads stale values. A graph replay repeats the computation in the same memory.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/api.h"

namespace {

using c10::IValue;
using torch::jit::Stack;

// Operators that don't compute anything; their native implementations work here.
const std::set<std::string> kNative = {"aten::empty.memory_format",
                                       "aten::empty_strided",
                                       "aten::as_strided",
                                       "aten::view",
                                       "aten::_reshape_alias",
                                       "aten::set_",
                                       "aten::resize_",
                                       "aten::set_.source_Storage",
                                       "aten::set_.source_Tensor",
                                       "aten::record_stream",
                                       "aten::unfold",
                                       "aten::set_.source_Storage_storage_offset",
                                       "aten::view_as_real",
                                       "aten::view_as_complex",
                                       "aten::is_set_to",
                                       "aten::_local_scalar_dense"};

// Dispatches to the CPU kernel, below autograd, autocast and Python modes, which have already run.
struct BelowEverything {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_modes{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                           c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

// A CPU tensor that shares the memory of a CUDA tensor.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const c10::Storage& storage = t.storage();
  c10::Storage memory(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), nullptr,
                      false);
  at::Tensor host = at::detail::make_tensor<c10::TensorImpl>(
      std::move(memory), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) host._set_conj(true);
  if (t.is_neg()) host._set_neg(true);
  return host;
}

template <typename F>
IValue with_tensors(const IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(f(t));
    return list;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
    c10::List<std::optional<at::Tensor>> list;
    for (const IValue& element : value.toListRef())
      list.push_back(element.isNone() ? std::optional<at::Tensor>() : f(element.toTensor()));
    return list;
  }
  if (value.isDevice()) return value.toDevice().is_cuda() ? IValue(c10::Device(c10::kCPU)) : value;
  if (value.isGenerator()) return IValue();  // use the CPU's default generator
  return value;
}

// One call of an operator, on CPU tensors.
struct Call {
  c10::OperatorHandle op;
  Stack arguments;              // share the memory of the CUDA tensors
  std::vector<size_t> written;  // indices of the arguments that the operator writes; it gets copies of these

  // Returns the results; copies[i] is the value that was written to the i-th argument.
  Stack run(Stack& copies) const {
    const BelowEverything guard;
    copies = arguments;
    for (size_t i : written) {
      copies[i] = with_tensors(arguments[i], [](const at::Tensor& t) { return t.defined() ? t.clone() : t; });
    }
    Stack stack = copies;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    return stack;
  }
};

void add_tensors(const IValue& value, std::vector<at::Tensor>& all) {
  with_tensors(value, [&](const at::Tensor& t) {
    all.push_back(t);
    return t;
  });
}

// Copies results to the CUDA tensors when the stream runs.
struct Delivery {
  std::vector<at::Tensor> to, from;  // CPU tensors
  std::unique_ptr<Call> again;       // in a capture: recomputes `from`
  std::vector<size_t> returned;      // indices of these tensors among all results of the call

  void run() {
    const BelowEverything guard;
    if (again != nullptr) {
      Stack copies;
      std::vector<at::Tensor> all;
      for (const IValue& value : again->run(copies)) add_tensors(value, all);
      for (size_t i : again->written) add_tensors(copies[i], all);
      for (size_t i = 0; i < from.size(); ++i) from[i] = all[returned[i]];
    }
    for (size_t i = 0; i < to.size(); ++i) at::native::copy_(to[i], from[i], false);
  }
};

void check(const char* error) {
  TORCH_CHECK(error == nullptr, error);
}

c10::Device device_of(const Stack& arguments) {
  std::vector<at::Tensor> all;
  for (const IValue& value : arguments) {
    if (value.isDevice() && value.toDevice().is_cuda() && value.toDevice().has_index())
      return value.toDevice();
    add_tensors(value, all);
  }
  for (const at::Tensor& t : all) {
    if (t.defined() && t.is_cuda()) return t.device();
  }
  return c10::Device(c10::kCUDA, c10::cuda::current_device());
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const Stack originals = torch::jit::pop(*stack, count);
  const c10::Device device = device_of(originals);
  const c10::cuda::CUDAGuard guard(device);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  const bool capturing = stand_in_is_capturing(stream);
  const bool waits = op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
  if (waits) check(stand_in_synchronizing(toString(op.operator_name()).c_str()));
  if (!capturing) check(stand_in_run_stream(stream));

  auto call = std::make_unique<Call>(Call{op, {}, {}});
  for (size_t i = 0; i < count; ++i) {
    call->arguments.push_back(with_tensors(originals[i], on_host));
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) call->written.push_back(i);
  }
  Stack copies;
  const Stack results = call->run(copies);

  auto delivery = std::make_unique<Delivery>();
  size_t position = 0;
  const auto deliver = [&](const at::Tensor& to, const at::Tensor& from) {
    delivery->to.push_back(on_host(to));
    delivery->from.push_back(from);
    delivery->returned.push_back(position);
  };
  // Pairs of a tensor that the CPU kernel received and the CUDA tensor that it stands for.
  std::vector<std::pair<at::Tensor, at::Tensor>> known;
  for (size_t i = 0; i < count; ++i) {
    std::vector<at::Tensor> seen, given;
    add_tensors(copies[i], seen);
    add_tensors(originals[i], given);
    for (size_t n = 0; n < seen.size(); ++n) {
      if (seen[n].defined()) known.emplace_back(seen[n], given[n]);
    }
  }
  const auto deliver_result = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined()) return ++position, t;
    for (const auto& [seen, given] : known) {
      if (seen.is_same(t)) return ++position, given;
      if (given.is_cuda() && t.has_storage() && t.numel() > 0 && t.storage().data() == given.storage().data())
        return ++position,
               at::native::as_strided_tensorimpl(given, t.sizes(), t.strides(), t.storage_offset());
    }
    at::Tensor result = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
    deliver(result, t);
    ++position;
    return result;
  };
  Stack outputs;
  for (const IValue& value : results) outputs.push_back(with_tensors(value, deliver_result));
  for (size_t i : call->written) {
    std::vector<at::Tensor> wrote, given;
    add_tensors(copies[i], wrote);
    add_tensors(originals[i], given);
    for (size_t n = 0; n < wrote.size(); ++n, ++position) {
      if (!wrote[n].defined()) continue;
      if (!given[n].is_cuda()) {  // a CPU tensor among CUDA tensors
        given[n].copy_(wrote[n]);
        continue;
      }
      if (given[n].sizes() != wrote[n].sizes()) given[n].resize_(wrote[n].sizes());
      deliver(given[n], wrote[n]);
    }
  }
  if (capturing) delivery->again = std::move(call);
  stand_in_enqueue(
      stream, schema.name().c_str(), [](void* state) { static_cast<Delivery*>(state)->run(); },
      [](void* state) { delete static_cast<Delivery*>(state); }, delivery.release());
  for (IValue& value : outputs) stack->push_back(std::move(value));
}

// Copies between devices and contiguous copies use torch's implementation, which calls cudaMemcpyAsync.
void copy(const c10::OperatorHandle& op, Stack* stack) {
  const at::Tensor self = torch::jit::peek(*stack, 0, 3).toTensor(),
                   from = torch::jit::peek(*stack, 1, 3).toTensor();
  const bool whole = self.is_contiguous() && from.is_contiguous() && self.sizes() == from.sizes() &&
                     self.scalar_type() == from.scalar_type() && self.is_conj() == from.is_conj() &&
                     self.is_neg() == from.is_neg();
  if (self.device() == from.device() && !whole) {
    compute(op, stack);
    return;
  }
  const bool non_blocking = torch::jit::peek(*stack, 2, 3).toBool();
  at::Tensor result = self;
  at::native::copy_(result, from, non_blocking);
  torch::jit::drop(*stack, 3);
  stack->push_back(result);
}

std::unique_ptr<torch::Library> library;

}  // namespace

// Call once, after stand_in_attach().
extern "C" __attribute__((visibility("default"))) void stand_in_override_operators() {
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__,
                                             __LINE__);
  auto names = c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CUDA);
  for (const c10::OperatorName& name : names) {
    const std::string full = toString(name);
    if (full.compare(0, 6, "aten::") != 0 || kNative.count(full) > 0) continue;
    library->impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
  library->impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy>());
}
