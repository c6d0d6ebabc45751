// Reports torch's state to the stand-in runtime: the caching allocator's blocks and the current stream.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include "runtime/api.h"

namespace {

void trace(const c10::CachingDeviceAllocator::TraceEntry& entry) {
  using Entry = c10::CachingDeviceAllocator::TraceEntry;
  const auto report = [&](stand_in_event event) {
    stand_in_trace(event, entry.device_, reinterpret_cast<void*>(entry.addr_), entry.size_,
                   static_cast<cudaStream_t>(entry.stream_));
  };
  if (entry.action_ == Entry::ALLOC) report(stand_in_allocated);
  if (entry.action_ == Entry::FREE_COMPLETED) report(stand_in_freed);
  if (entry.action_ == Entry::SEGMENT_ALLOC) report(stand_in_segment);
}

cudaStream_t current_stream(int device) {
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
}

}  // namespace

// Call once, after torch.cuda.init().
extern "C" __attribute__((visibility("default"))) void stand_in_attach() {
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(trace);
  stand_in_set_current_stream(current_stream);
}
