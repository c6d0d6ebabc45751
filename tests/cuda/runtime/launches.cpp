// Checks and counts launches. A launch comes either from the host-compiled kernels (stand_in_launch_kernel),
// which run later on their stream, or from nvcc's code in the shipped library (cudaLaunchKernel). The
// latter's kernels can't run here; their launches are checked and counted.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "limits.h"
#include "runtime.h"

namespace stand_in {

int refused();
void remember_failure(const char* text);

namespace {

struct Description {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  cudaStream_t stream;
};

stand_in_counts counts;
bool recording = false, kernels_skipped = false;
std::string recorded;
std::map<const void*, int> allowed_shared;
std::map<const void*, std::string> names;  // of the kernels compiled by nvcc
cudaStream_t (*current_stream)(int device) = nullptr;

// The sizes of a kernel's parameters, by the kernel's name without template arguments. They are read from the
// file AFA_STAND_IN_PARAMETERS, because nvcc's code does not contain them.
const std::map<std::string, std::vector<size_t>>& parameter_sizes() {
  static const auto sizes = [] {
    std::map<std::string, std::vector<size_t>> result;
    std::ifstream file(std::getenv("AFA_STAND_IN_PARAMETERS"));
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      words >> name;
      for (size_t size; words >> size;) result[name].push_back(size);
    }
    return result;
  }();
  return sizes;
}

// The symbols of the library that contains an address, by offset. Needed because kernels have internal
// linkage.
const std::map<uintptr_t, std::string>& symbols_of(const Dl_info& library) {
  static std::map<std::string, std::map<uintptr_t, std::string>> known;
  const auto [entry, is_new] = known.try_emplace(library.dli_fname);
  if (!is_new) return entry->second;
  FILE* const pipe = popen(("nm --defined-only '" + entry->first + "'").c_str(), "r");
  if (pipe == nullptr) return entry->second;
  char line[4096];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    std::istringstream words(line);
    uintptr_t offset = 0;
    std::string type, name;
    if (words >> std::hex >> offset >> type >> name) entry->second[offset] = name;
  }
  pclose(pipe);
  return entry->second;
}

// "walk_step_kernel" from _ZN3afa..._GLOBAL__N__...16walk_step_kernelIfEEvNS_10WalkParamsE: the last name of
// the nested name, before its template arguments.
std::string base_name(const std::string& mangled) {
  std::string last;
  size_t i = mangled.compare(0, 3, "_ZN") == 0 ? 3 : mangled.compare(0, 2, "_Z") == 0 ? 2 : mangled.size();
  while (i < mangled.size() && (mangled[i] == 'L' || (mangled[i] >= '0' && mangled[i] <= '9'))) {
    if (mangled[i] == 'L' && ++i == mangled.size()) break;
    size_t digits = 0;
    const size_t length = std::stoul(mangled.substr(i), &digits);
    last = mangled.substr(i + digits, length);
    i += digits + length;
  }
  return last;
}

std::string name_of(const Description& d) {
  Dl_info library;
  if (names.count(d.kernel) > 0) return base_name(names[d.kernel]);
  if (dladdr(d.kernel, &library) == 0) return d.name;
  const auto& symbols = symbols_of(library);
  const auto found =
      symbols.find(reinterpret_cast<uintptr_t>(d.kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase));
  return found == symbols.end() ? d.name : base_name(found->second);
}

std::string json(const Description& d, const std::vector<stand_in_span>& parameters) {
  const Stream* const stream = stream_of(d.stream);
  std::ostringstream text;
  text << "{\"kernel\": \"" << name_of(d) << "\", \"grid\": [" << d.grid.x << ", " << d.grid.y << ", "
       << d.grid.z << "], \"block\": [" << d.block.x << ", " << d.block.y << ", " << d.block.z
       << "], \"shared_bytes\": " << d.shared_bytes
       << ", \"cooperative\": " << (d.cooperative ? "true" : "false")
       << ", \"device\": " << device_of(*stream) << ", \"stream\": " << reinterpret_cast<uintptr_t>(d.stream)
       << ", \"parameters\": [";
  for (size_t i = 0; i < parameters.size(); ++i) text << (i > 0 ? ", " : "") << parameters[i].size;
  text << "]}\n";
  return text.str();
}

// Limits that a GPU checks, too.
cudaError_t check_limits(const Description& d) {
  const dim3 grid = d.grid, block = d.block;
  const bool empty =
      grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  const bool grid_fits = grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16;
  const bool block_fits =
      block.x <= 1024 && block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024;
  if (empty || !grid_fits || !block_fits) return error(cudaErrorInvalidConfiguration);
  const auto allowed = allowed_shared.find(d.kernel);
  const int most = allowed == allowed_shared.end() ? 0 : allowed->second;
  if (d.shared_bytes > static_cast<size_t>(std::max(most, kDefaultSharedBytes)))
    return error(cudaErrorInvalidValue);
  if (!d.cooperative) return cudaSuccess;
  if (refused() == 1) return error(cudaErrorNotSupported);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (refused() == 2 || blocks > static_cast<uint64_t>(processors()) * kBlocksPerProcessor)
    return error(cudaErrorCooperativeLaunchTooLarge);
  return cudaSuccess;
}

// False for small integers, and for an int below 2^24 followed by padding that contains half of an address.
// For this to work, device memory begins 2^24 bytes after a multiple of 2^32, and a device's range ends
// before the next multiple.
bool looks_like_a_pointer(const void* at) {
  const auto bits = reinterpret_cast<uintptr_t>(at);
  return bits >> 47 == 0 && bits >> 40 != 0 && (bits & 0xffffffff) >> 24 != 0;
}

// True also for some host pointers, since a bool may be followed by padding that contains the rest of
// an address.
bool may_be_a_bool(const void* at) {
  return (reinterpret_cast<uintptr_t>(at) & 0xff) <= 1;
}

// Checks that only the stand-in can do: device, stream and pointers. Adds the blocks that the arguments point
// to.
cudaError_t check_arguments(const Description& d, Stream& stream,
                            const std::vector<stand_in_span>& parameters, std::vector<Span>& blocks) {
  const int device = current_device();
  if (device_of(stream) != device) {
    return fault(cudaErrorInvalidResourceHandle,
                 "launch of %s on a stream of device %d while device %d is current", name_of(d).c_str(),
                 device_of(stream), device);
  }
  if (current_stream != nullptr && stream_of(current_stream(device)) != &stream) {
    return fault(cudaErrorInvalidResourceHandle,
                 "launch of %s on stream %p, which is not torch's current stream of device %d",
                 name_of(d).c_str(), static_cast<void*>(d.stream), device);
  }
  for (const stand_in_span& parameter : parameters) {
    for (size_t i = 0; i + sizeof(void*) <= parameter.size; i += sizeof(void*)) {
      const char* at;
      __builtin_memcpy(&at, parameter.begin + i, sizeof(at));
      if (!looks_like_a_pointer(at)) continue;
      const int owner = device_of(at);
      if (owner < 0) {
        if (!may_be_a_bool(at) && is_mapped_host_memory(at))
          return fault(cudaErrorIllegalAddress, "launch of %s with host pointer %p", name_of(d).c_str(), at);
        continue;
      }
      if (owner != device) {
        return fault(cudaErrorIllegalAddress,
                     "launch of %s on device %d with a pointer to memory of device %d", name_of(d).c_str(),
                     device, owner);
      }
      const Block* const block = live_block(at);
      if (block == nullptr) {
        return fault(cudaErrorIllegalAddress, "launch of %s with pointer %p, which is %s", name_of(d).c_str(),
                     at, why_not_live(at).c_str());
      }
      blocks.push_back(block->span);
    }
  }
  return cudaSuccess;
}

cudaError_t launch(const Description& d, const std::vector<stand_in_span>& parameters,
                   const std::function<void(const std::vector<Span>&)>& run) {
  check_that_launch_errors_were_fetched();
  ++counts.launches;
  Stream* const stream = stream_of(d.stream);
  std::vector<Span> blocks;
  cudaError_t failed = stream == nullptr ? cudaErrorInvalidResourceHandle : check_limits(d);
  if (failed == cudaSuccess) failed = check_arguments(d, *stream, parameters, blocks);
  if (failed != cudaSuccess) {
    remember_launch_error(name_of(d));
    return failed;
  }
  if (recording) recorded += json(d, parameters);
  if (!run || kernels_skipped) return cudaSuccess;
  Item item;
  item.kind = Item::launch;
  item.name = d.name;
  item.blocks = blocks;
  item.run = [run, blocks] { run(blocks); };
  enqueue(*stream, std::move(item));
  return cudaSuccess;
}

// ---- kernels compiled by nvcc ----

cudaError_t launch_compiled(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                            cudaStream_t stream, bool cooperative) {
  const auto guard = lock();
  const std::string& name = names[kernel];
  if (name.find("3afa") == std::string::npos) {
    return fault(cudaErrorNotSupported,
                 "%s is a kernel of torch, which cannot run on the stand-in; see tests/cuda/README.md",
                 name.empty() ? "an unknown kernel" : name.c_str());
  }
  const std::string base = base_name(name);
  std::vector<stand_in_span> parameters;
  if (std::getenv("AFA_STAND_IN_PARAMETERS") == nullptr)  // without sizes, the arguments are not checked
    return launch({base.c_str(), kernel, grid, block, shared_bytes, cooperative, stream}, parameters,
                  nullptr);
  const auto sizes = parameter_sizes().find(base);
  if (sizes == parameter_sizes().end()) {
    return fault(cudaErrorNotSupported, "AFA_STAND_IN_PARAMETERS does not list the kernel %s", base.c_str());
  }
  for (size_t i = 0; i < sizes->second.size(); ++i)
    parameters.push_back({static_cast<const char*>(arguments[i]), sizes->second[i]});
  return launch({base.c_str(), kernel, grid, block, shared_bytes, cooperative, stream}, parameters, nullptr);
}

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

void count(uint64_t stand_in_counts::* counter, uint64_t by) {
  counts.*counter += by;
}

void record_allocation(size_t bytes) {
  ++counts.allocations;
  counts.allocated_bytes += bytes;
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API void stand_in_set_current_stream(cudaStream_t (*function)(int device)) {
  current_stream = function;
}

STAND_IN_API void stand_in_get_counts(stand_in_counts* result) {
  const auto guard = lock();
  *result = counts;
}

STAND_IN_API void stand_in_record_launches(bool on) {
  const auto guard = lock();
  if (on && !recording) recorded.clear();
  recording = on;
}

STAND_IN_API const char* stand_in_launches() {
  static thread_local std::string text;
  const auto guard = lock();
  text = recorded;
  return text.c_str();
}

STAND_IN_API void stand_in_skip_kernels(bool on) {
  kernels_skipped = on;
}

STAND_IN_API cudaError_t stand_in_launch_kernel(const stand_in_launch* l) {
  const auto guard = lock();
  const std::shared_ptr<void> state(l->state, l->destroy);
  const auto run = [state, run = l->run](const std::vector<Span>& blocks) {
    std::vector<stand_in_span> spans;
    for (const Span& span : blocks) spans.push_back({span.begin, span.size});
    if (const char* text = run(state.get(), spans.data(), spans.size())) remember_failure(text);
  };
  const std::vector<stand_in_span> parameters(l->parameters, l->parameters + l->parameter_count);
  return launch({l->name, l->kernel, l->grid, l->block, l->shared_bytes, l->cooperative, l->stream},
                parameters, run);
}

STAND_IN_API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                          size_t shared_bytes, cudaStream_t stream) {
  return launch_compiled(kernel, grid, block, arguments, shared_bytes, stream, false);
}

STAND_IN_API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block,
                                                     void** arguments, size_t shared_bytes,
                                                     cudaStream_t stream) {
  return launch_compiled(kernel, grid, block, arguments, shared_bytes, stream, true);
}

STAND_IN_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel,
                                             void** arguments) {
  return launch_compiled(kernel, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream, false);
}

STAND_IN_API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const auto guard = lock();
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > max_shared_bytes())
    return error(cudaErrorInvalidValue);
  allowed_shared[kernel] = value;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                                       size_t shared_bytes) {
  const bool fits = threads > 0 && threads <= 1024 && shared_bytes <= static_cast<size_t>(max_shared_bytes());
  *blocks = fits ? kBlocksPerProcessor : 0;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* kernel, int threads, size_t shared_bytes, unsigned int) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes);
}

// ---- functions that nvcc's code calls ----

STAND_IN_API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
STAND_IN_API void __cudaRegisterFatBinaryEnd(void**) {}
STAND_IN_API void __cudaUnregisterFatBinary(void**) {}
STAND_IN_API char __cudaInitModule(void**) {
  return 1;
}
STAND_IN_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
STAND_IN_API void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*,
                                         uint3*, dim3*, dim3*, int*) {
  const auto guard = lock();
  names[kernel] = name;
}
STAND_IN_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                                  cudaStream_t stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
STAND_IN_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                                    void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
STAND_IN_API cudaError_t __cudaGetKernel(cudaKernel_t* result, const void* kernel) {
  *result = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}
STAND_IN_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                            size_t shared_bytes, cudaStream_t stream) {
  return launch_compiled(kernel, grid, block, arguments, shared_bytes, stream, false);
}
