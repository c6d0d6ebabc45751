// Lazy streams: enqueued work runs only when the host waits for it, together with the work it depends on. So
// a missing wait between streams gives wrong values. Among streams that no event orders, the one enqueued to
// last runs first, or a seeded random order is used. This file also implements events and copies.
#include "streams.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <utility>

#include "limits.h"

namespace stand_in {
namespace {

constexpr int kQueriesUntilDone = 3;  // so that a host that polls eventually sees progress

std::string failure;  // message of a failed kernel, until a call reports it
bool waiting_forbidden = false;
uint64_t now = 0;
bool latest_first = true;
std::mt19937_64 random_order;
std::set<Event*> events;

Stream* default_stream(int device) {
  static Stream* streams[kMaxDevices] = {};
  if (streams[device] == nullptr) {
    streams[device] = new Stream;
    streams[device]->device = device;
    streams[device]->is_default = true;
    all_streams().push_back(streams[device]);
  }
  return streams[device];
}

void run_until(Stream& stream, uint64_t until) {
  while (!stream.queue.empty() && stream.queue.front().number <= until) {
    Item item = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (item.kind == Item::wait) {
      run_until(*item.stream, item.until);
    } else {
      execute(item);
    }
    stream.done = item.number;
  }
}

// Collects what the first `until` items of a stream wait for, directly or indirectly: item number by stream.
void add_waits(Stream& stream, uint64_t until, std::map<Stream*, uint64_t>& waits) {
  uint64_t& known = waits[&stream];
  if (known >= until) return;
  known = until;
  for (const Item& item : stream.queue) {
    if (item.kind == Item::wait && item.number <= until) add_waits(*item.stream, item.until, waits);
  }
}

void push(Stream& stream, Item item) {
  item.number = ++stream.last;
  stream.queue.push_back(std::move(item));
  stream.queued_at = ++now;
  stream.queries = 0;
}

void push_wait(Stream& stream, Stream& other, uint64_t until) {
  if (other.done >= until || &stream == &other) return;
  Item item;
  item.kind = Item::wait;
  item.name = "wait";
  item.stream = &other;
  item.until = until;
  push(stream, std::move(item));
}

std::vector<Stream*> in_order(int device) {
  std::vector<Stream*> chosen;
  for (Stream* stream : all_streams()) {
    if (device < 0 || stream->device == device) chosen.push_back(stream);
  }
  std::sort(chosen.begin(), chosen.end(), [](Stream* a, Stream* b) { return a->queued_at > b->queued_at; });
  if (!latest_first) std::shuffle(chosen.begin(), chosen.end(), random_order);
  return chosen;
}

Event* event_of(cudaEvent_t handle) {
  Event* event = reinterpret_cast<Event*>(handle);
  if (events.count(event) > 0) return event;
  fault(cudaErrorInvalidResourceHandle, "%p is not an event", static_cast<void*>(handle));
  return nullptr;
}

cudaError_t create_stream(cudaStream_t* result, unsigned int flags, int priority) {
  const auto guard = lock();
  Stream* stream = new Stream;
  stream->device = current_device();
  stream->blocking = (flags & cudaStreamNonBlocking) == 0;
  stream->priority = priority;
  all_streams().push_back(stream);
  *result = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

cudaError_t finish(Stream& stream) {
  count(&stand_in_counts::synchronizations);
  run(stream);
  return failure_of_kernels();
}

cudaError_t check_memory(const char* what, const void* at, size_t size) {
  if (device_of(at) < 0 || size == 0) return cudaSuccess;
  const Block* block = live_block(at);
  if (block == nullptr) {
    return fault(cudaErrorInvalidValue, "%s: %p is %s", what, at, why_not_live(at).c_str());
  }
  const size_t left =
      static_cast<size_t>(block->span.begin + block->span.size - static_cast<const char*>(at));
  if (size <= left) return cudaSuccess;
  return fault(cudaErrorInvalidValue, "%s: %zu bytes at %p, but the block has only %zu bytes from there",
               what, size, at, left);
}

cudaError_t copy(const char* what, void* to, const void* from, size_t size, cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  for (const void* at : {static_cast<const void*>(to), from}) {
    if (const cudaError_t bad = check_memory(what, at, size); bad != cudaSuccess) return bad;
  }
  const bool reads_pageable = device_of(from) < 0 && !is_pinned(from);
  const bool writes_pageable = device_of(to) < 0 && !is_pinned(to);
  if (writes_pageable || (reads_pageable && stream->capture != nullptr)) {
    const cudaError_t refused = check_that_host_may("a copy from or to pageable host memory", stream);
    if (refused != cudaSuccess) return refused;
  }
  Item item;
  item.name = what;
  if (reads_pageable) {  // copied now, because the caller may reuse the memory immediately
    auto bytes = std::make_shared<std::vector<char>>(static_cast<const char*>(from),
                                                     static_cast<const char*>(from) + size);
    item.run = [to, bytes] { std::memcpy(to, bytes->data(), bytes->size()); };
  } else {
    item.run = [to, from, size] { std::memmove(to, from, size); };
  }
  enqueue(*stream, std::move(item));
  return writes_pageable ? finish(*stream) : cudaSuccess;
}

cudaError_t set(const char* what, void* to, int value, size_t size, cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t bad = check_memory(what, to, size); bad != cudaSuccess) return bad;
  Item item;
  item.name = what;
  item.run = [to, value, size] { std::memset(to, value, size); };
  enqueue(*stream, std::move(item));
  return cudaSuccess;
}

}  // namespace

std::vector<Stream*>& all_streams() {
  static std::vector<Stream*>* streams = new std::vector<Stream*>;
  return *streams;
}

Stream* stream_of(cudaStream_t handle, int device) {
  if (handle == nullptr || handle == cudaStreamLegacy) return default_stream(device);
  Stream* const stream = reinterpret_cast<Stream*>(handle);
  const auto& all = all_streams();
  if (std::find(all.begin(), all.end(), stream) != all.end()) return stream;
  fault(cudaErrorInvalidResourceHandle, "%p is not a stream handle; is it a stream ID?",
        static_cast<void*>(handle));
  return nullptr;
}

int device_of(const Stream& stream) {
  return stream.device;
}

Graph* captured_by(const Stream& stream) {
  return stream.capture.get();
}

void enqueue(Stream& stream, Item item) {
  if (stream.capture != nullptr) {
    add_node(stream, std::move(item));
    return;
  }
  if (stream.is_default) {
    for (Stream* other : all_streams()) {
      if (other->device == stream.device && other->blocking) push_wait(stream, *other, other->last);
    }
  } else if (stream.blocking) {
    Stream& first = *default_stream(stream.device);
    push_wait(stream, first, first.last);
  }
  push(stream, std::move(item));
}

void execute(Item& item) {
  if (item.run) item.run();
}

void run(Stream& stream) {
  run_until(stream, stream.last);
}

void run_device(int device) {
  for (Stream* stream : in_order(device)) run(*stream);
}

void run_everything() {
  run_device(-1);
}

std::string launch_that_still_uses(const Block& block) {
  Stream* const own = static_cast<Stream*>(block.stream);
  std::map<Stream*, uint64_t> waits;
  bool searched = false;
  for (Stream* stream : all_streams()) {
    if (stream == own) continue;
    for (const Item& item : stream->queue) {
      const bool uses = std::any_of(item.blocks.begin(), item.blocks.end(),
                                    [&](const Span& span) { return span.begin == block.span.begin; });
      if (!uses) continue;
      if (!std::exchange(searched, true)) add_waits(*own, own->last, waits);
      if (item.number > waits[stream]) return item.name;
    }
  }
  return "";
}

cudaError_t check_that_host_may(const char* what, Stream* stream) {
  if (waiting_forbidden)
    return fault(cudaErrorNotPermitted, "%s where the host must not wait for the device", what);
  if (stream != nullptr && stream->capture != nullptr) {
    stream->capture->invalid = true;
  } else if (!any_capture_forbids_unsafe_calls()) {
    return cudaSuccess;
  }
  return fault(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing: %s",
               what);
}

cudaError_t failure_of_kernels() {
  if (failure.empty()) return cudaSuccess;
  return fault(cudaErrorLaunchFailure, "%s", std::exchange(failure, std::string()).c_str());
}

void remember_failure(const char* text) {
  if (failure.empty()) failure = text;
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API void stand_in_set_order(const char* name) {
  const auto guard = lock();
  latest_first = std::strcmp(name, "latest") == 0;
  if (!latest_first) random_order.seed(std::stoull(name));
}

STAND_IN_API void stand_in_forbid_waiting(bool on) {
  const auto guard = lock();
  waiting_forbidden = on;
}

STAND_IN_API const char* stand_in_synchronizing(const char* what) {
  const auto guard = lock();
  count(&stand_in_counts::synchronizations);
  const cudaError_t refused = check_that_host_may(what);
  return refused == cudaSuccess ? nullptr : cudaGetErrorString(refused);
}

STAND_IN_API const char* stand_in_run_stream(cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaGetErrorString(cudaErrorInvalidResourceHandle);
  run(*stream);
  const cudaError_t failed = failure_of_kernels();
  return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}

STAND_IN_API bool stand_in_is_capturing(cudaStream_t handle) {
  const auto guard = lock();
  const Stream* const stream = stream_of(handle);
  return stream != nullptr && stream->capture != nullptr;
}

STAND_IN_API void stand_in_enqueue(cudaStream_t handle, const char* name, void (*run)(void*),
                                   void (*destroy)(void*), void* state) {
  const auto guard = lock();
  const std::shared_ptr<void> owner(state, destroy);
  count(&stand_in_counts::torch_operations);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return;
  Item item;
  item.name = name;
  item.run = [run, owner] { run(owner.get()); };
  enqueue(*stream, std::move(item));
}

// ---- streams ----

STAND_IN_API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return create_stream(stream, cudaStreamDefault, 0);
}

STAND_IN_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  return create_stream(stream, flags, 0);
}

STAND_IN_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int flags,
                                                      int priority) {
  return create_stream(stream, flags, priority);
}

STAND_IN_API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  run(*stream);  // not deleted, because events may still point to it
  auto& all = all_streams();
  all.erase(std::find(all.begin(), all.end(), stream));
  return failure_of_kernels();
}

STAND_IN_API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  *priority = stream->priority;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -1;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  const cudaError_t refused = check_that_host_may("cudaStreamSynchronize", stream);
  return refused != cudaSuccess ? refused : finish(*stream);
}

STAND_IN_API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->capture != nullptr) return check_that_host_may("cudaStreamQuery", stream);
  if (++stream->queries > kQueriesUntilDone) run(*stream);
  const cudaError_t failed = failure_of_kernels();
  return failed != cudaSuccess || stream->queue.empty() ? failed : error(cudaErrorNotReady);
}

STAND_IN_API cudaError_t cudaDeviceSynchronize() {
  const auto guard = lock();
  const cudaError_t refused = check_that_host_may("cudaDeviceSynchronize");
  if (refused != cudaSuccess) return refused;
  count(&stand_in_counts::synchronizations);
  run_device(current_device());
  return failure_of_kernels();
}

STAND_IN_API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  Item item;
  item.name = "cudaLaunchHostFunc";
  item.run = [function, data] { function(data); };
  enqueue(*stream, std::move(item));
  return cudaSuccess;
}

// ---- events ----

STAND_IN_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* result, unsigned int) {
  const auto guard = lock();
  Event* const event = new Event;
  events.insert(event);
  *result = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaEventCreate(cudaEvent_t* result) {
  return cudaEventCreateWithFlags(result, cudaEventDefault);
}

STAND_IN_API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const auto guard = lock();
  Event* const event = event_of(handle);
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  events.erase(event);  // not deleted, because a record of it may still be queued
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle,
                                                  unsigned int) {
  const auto guard = lock();
  Event* const event = event_of(handle);
  Stream* const stream = stream_of(stream_handle);
  if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
  event->capture = stream->capture;
  event->captured = stream->captured_last;
  event->stream = stream;
  event->queries = 0;
  if (stream->capture != nullptr) return cudaSuccess;
  Item item;
  item.kind = Item::record;
  item.name = "record of an event";
  item.run = [event] {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    event->milliseconds = std::chrono::duration<double, std::milli>(time).count();
  };
  enqueue(*stream, std::move(item));
  event->until = stream->last;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

STAND_IN_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned int) {
  const auto guard = lock();
  Event* const event = event_of(handle);
  Stream* const stream = stream_of(stream_handle);
  if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (event->stream == nullptr) return cudaSuccess;  // never recorded
  if (event->capture == nullptr) {
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      return fault(cudaErrorStreamCaptureIsolation,
                   "a capturing stream waits for an event recorded outside the capture");
    }
    push_wait(*stream, *event->stream, event->until);
    return cudaSuccess;
  }
  if (stream->capture == nullptr) {  // the event's stream is being captured: this stream joins the capture
    stream->capture = event->capture;
    stream->captured_last.clear();
  } else if (stream->capture != event->capture) {
    return fault(cudaErrorStreamCaptureMerge, "a capturing stream waits for an event of another capture");
  }
  auto& last = stream->captured_last;
  for (Node* node : event->captured) {
    if (std::find(last.begin(), last.end(), node) == last.end()) last.push_back(node);
  }
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const auto guard = lock();
  Event* const event = event_of(handle);
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  const cudaError_t refused =
      event->capture == nullptr
          ? check_that_host_may("cudaEventSynchronize")
          : fault(cudaErrorCapturedEvent, "cudaEventSynchronize of an event recorded in a capture");
  if (refused != cudaSuccess) return refused;
  count(&stand_in_counts::synchronizations);
  if (event->stream != nullptr) run_until(*event->stream, event->until);
  return failure_of_kernels();
}

STAND_IN_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const auto guard = lock();
  Event* const event = event_of(handle);
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  if (event->capture != nullptr)
    return fault(cudaErrorCapturedEvent, "cudaEventQuery of an event recorded in a capture");
  if (event->stream == nullptr) return cudaSuccess;
  if (++event->queries > kQueriesUntilDone) run_until(*event->stream, event->until);
  const cudaError_t failed = failure_of_kernels();
  return failed != cudaSuccess || event->stream->done >= event->until ? failed : error(cudaErrorNotReady);
}

STAND_IN_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto guard = lock();
  Event *const first = event_of(start), *const second = event_of(end);
  if (first == nullptr || second == nullptr || first->stream == nullptr || second->stream == nullptr)
    return error(cudaErrorInvalidResourceHandle);
  if (first->stream->done < first->until || second->stream->done < second->until)
    return error(cudaErrorNotReady);
  *milliseconds = static_cast<float>(second->milliseconds - first->milliseconds);
  return cudaSuccess;
}

// ---- copies ----

STAND_IN_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                         cudaStream_t stream) {
  return copy("cudaMemcpyAsync", to, from, size, stream);
}

STAND_IN_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                             cudaStream_t stream) {
  return copy("cudaMemcpyPeerAsync", to, from, size, stream);
}

STAND_IN_API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  const auto guard = lock();
  const cudaError_t refused = check_that_host_may("cudaMemcpy");
  if (refused != cudaSuccess) return refused;
  const cudaError_t failed = copy("cudaMemcpy", to, from, size, nullptr);
  return failed != cudaSuccess ? failed : finish(*stream_of(nullptr));
}

STAND_IN_API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return set("cudaMemsetAsync", to, value, size, stream);
}

STAND_IN_API cudaError_t cudaMemset(void* to, int value, size_t size) {
  return set("cudaMemset", to, value, size, nullptr);
}
