// Device memory is host memory in a reserved address range per device. So any word of a kernel's arguments in
// that range is known to be a pointer to that device. All live blocks are tracked: those of cudaMalloc and,
// from the bridge's reports, the caching allocator's blocks inside them.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "limits.h"
#include "runtime.h"

namespace stand_in {
namespace {

constexpr size_t kGap = 64 << 10;  // between allocations; the size of a red zone of AddressSanitizer
constexpr size_t kPage = 4096;

struct Allocation {
  Block block;
  bool segment = false;  // owned by the caching allocator, which divides it into blocks
};

struct State {
  char* next[kMaxDevices];  // start of the memory that was never used
  size_t used[kMaxDevices] = {};
  std::multimap<size_t, char*> free[kMaxDevices];  // by size
  std::map<const char*, Allocation> allocations;
  std::map<const char*, Block> blocks;
  std::map<const char*, Block> freed;  // the last block that was freed at an address
  std::map<const char*, size_t> pinned;

  State() {
    const size_t size = kDeviceRange * kMaxDevices;
    void* const wanted = reinterpret_cast<void*>(kDeviceMemory);
    void* const at = mmap(wanted, size, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (at != wanted) std::abort();
    for (int device = 0; device < kMaxDevices; ++device) {
      next[device] = static_cast<char*>(at) + device * kDeviceRange + kDeviceStart;
    }
  }
};

State& state() {
  static State* state = new State;
  return *state;
}

size_t rounded(size_t size) {
  return (size + kPage - 1) / kPage * kPage;
}

template <typename Map>
auto holder(Map& map, const void* at) {
  auto found = map.upper_bound(static_cast<const char*>(at));
  return found == map.begin() ? map.end() : std::prev(found);
}

// AddressSanitizer's functions, if the process has them.
using Region = void (*)(const void volatile*, size_t);
void guard_region(const void* at, size_t size, bool reachable) {
  static const Region poison_region =
      reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "__asan_poison_memory_region"));
  static const Region unpoison_region =
      reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "__asan_unpoison_memory_region"));
  const Region region = reachable ? unpoison_region : poison_region;
  if (region != nullptr) region(at, size);
}

}  // namespace

int device_of(const void* at) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - kDeviceMemory;
  return offset < kDeviceRange * kMaxDevices ? static_cast<int>(offset / kDeviceRange) : -1;
}

const Block* live_block(const void* at) {
  State& all = state();
  const auto allocation = holder(all.allocations, at);
  if (allocation == all.allocations.end() || !allocation->second.block.span.contains(at)) return nullptr;
  if (!allocation->second.segment) return &allocation->second.block;
  const auto block = holder(all.blocks, at);
  return block != all.blocks.end() && block->second.span.contains(at) ? &block->second : nullptr;
}

std::string why_not_live(const void* at) {
  const auto block = holder(state().freed, at);
  const bool freed = block != state().freed.end() && block->second.span.contains(at);
  return freed ? "in a freed block of " + std::to_string(block->second.span.size) + " bytes"
               : "not in any block that was ever allocated";
}

bool is_mapped_host_memory(const void* at) {
  unsigned char resident;
  const uintptr_t page = reinterpret_cast<uintptr_t>(at) / kPage * kPage;
  return device_of(at) < 0 && mincore(reinterpret_cast<void*>(page), kPage, &resident) == 0;
}

bool is_pinned(const void* at) {
  const auto found = holder(state().pinned, at);
  return found != state().pinned.end() &&
         static_cast<size_t>(static_cast<const char*>(at) - found->first) < found->second;
}

void poison(Span span) {
  std::memset(const_cast<char*>(span.begin), 0xff, span.size);
  guard_region(span.begin, span.size, false);
}

void unpoison(Span span) {
  guard_region(span.begin, span.size, true);
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API cudaError_t cudaMalloc(void** result, size_t size) {
  const auto guard = lock();
  *result = nullptr;
  if (const cudaError_t refused = check_that_host_may("cudaMalloc"); refused != cudaSuccess) return refused;
  State& all = state();
  const int device = current_device();
  const size_t wanted = rounded(size == 0 ? 1 : size);
  if (all.used[device] + wanted > kDeviceBytes) return error(cudaErrorMemoryAllocation);
  char* at = nullptr;
  const auto found = all.free[device].lower_bound(wanted);
  if (found != all.free[device].end() && found->first == wanted) {
    at = found->second;
    all.free[device].erase(found);
  } else {
    at = all.next[device];
    if (at + wanted + kGap > reinterpret_cast<char*>(kDeviceMemory) + (device + 1) * kDeviceRange)
      return error(cudaErrorMemoryAllocation);
    all.next[device] += wanted + kGap;
  }
  if (mprotect(at, wanted, PROT_READ | PROT_WRITE) != 0) return error(cudaErrorMemoryAllocation);
  all.used[device] += wanted;
  Allocation allocation;
  allocation.block.span = {at, size};
  allocation.block.device = device;
  all.allocations[at] = allocation;
  guard_region(at - kGap, kGap, false);
  guard_region(at + size, wanted - size + kGap, false);
  unpoison({at, size});
  count(&stand_in_counts::device_allocations);
  *result = at;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaFree(void* pointer) {
  const auto guard = lock();
  if (pointer == nullptr) return cudaSuccess;
  State& all = state();
  const auto found = all.allocations.find(static_cast<char*>(pointer));
  if (found == all.allocations.end())
    return fault(cudaErrorInvalidValue, "cudaFree of %p, which cudaMalloc did not return", pointer);
  run_everything();  // like cudaFree, which waits for the device
  const Block block = found->second.block;
  all.freed[block.span.begin] = block;
  all.used[block.device] -= rounded(block.span.size);
  all.free[block.device].emplace(rounded(block.span.size), static_cast<char*>(pointer));
  all.allocations.erase(found);
  madvise(pointer, rounded(block.span.size), MADV_DONTNEED);
  mprotect(pointer, rounded(block.span.size), PROT_NONE);
  return failure_of_kernels();
}

STAND_IN_API cudaError_t cudaHostAlloc(void** result, size_t size, unsigned int) {
  const auto guard = lock();
  *result = std::aligned_alloc(kPage, rounded(size == 0 ? 1 : size));
  if (*result == nullptr) return error(cudaErrorMemoryAllocation);
  state().pinned[static_cast<char*>(*result)] = size;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaFreeHost(void* pointer) {
  const auto guard = lock();
  run_everything();
  state().pinned.erase(static_cast<char*>(pointer));
  std::free(pointer);
  return failure_of_kernels();
}

STAND_IN_API cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  const auto guard = lock();
  *total = kDeviceBytes;
  *available = kDeviceBytes - state().used[current_device()];
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const auto guard = lock();
  std::memset(attributes, 0, sizeof(*attributes));
  const int device = device_of(pointer);
  attributes->device = device < 0 ? 0 : device;
  attributes->type = device >= 0          ? cudaMemoryTypeDevice
                     : is_pinned(pointer) ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
  attributes->devicePointer =
      attributes->type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(pointer);
  attributes->hostPointer = device >= 0 ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

STAND_IN_API void stand_in_trace(stand_in_event event, int device, void* pointer, size_t size,
                                 cudaStream_t handle) {
  const auto guard = lock();
  State& all = state();
  const char* const at = static_cast<const char*>(pointer);
  if (event == stand_in_segment) {
    const auto found = all.allocations.find(at);
    if (found != all.allocations.end()) found->second.segment = true;
    return;
  }
  Stream* const stream = stream_of(handle, device);
  if (stream == nullptr) return;
  if (event == stand_in_allocated) {
    Block block;
    block.span = {at, size};
    block.device = device;
    block.stream = stream;
    block.capture_id = capture_id(*stream);
    all.blocks[at] = block;
    all.freed.erase(at);
    Item item;
    item.name = "allocation";
    item.run = [span = block.span] { unpoison(span); };
    enqueue(*stream, std::move(item));
    record_allocation(size);
    return;
  }
  const auto found = all.blocks.find(at);
  if (found == all.blocks.end()) return;  // allocated before the bridge was attached
  const Block block = found->second;
  all.blocks.erase(found);
  all.freed[at] = block;
  const std::string user = launch_that_still_uses(block);
  if (!user.empty()) {
    report("a block of " + std::to_string(block.span.size) +
           " bytes was freed on its stream while a launch of " + user +
           " on another stream may still use it; no event orders the free after the launch");
  }
  if (capture_id(*stream) != block.capture_id) return;  // a replay must not overwrite memory that was reused
  Item item;
  item.name = "poison of a freed block";
  item.run = [span = block.span] { poison(span); };
  enqueue(*stream, std::move(item));
}

STAND_IN_API size_t stand_in_live_bytes(int device) {
  const auto guard = lock();
  size_t sum = 0;
  for (const auto& entry : state().blocks) sum += entry.second.device == device ? entry.second.span.size : 0;
  return sum;
}
