// What the files of the stand-in runtime share. README.md says what the runtime does; api.h is what the rest
// of the test bed calls. Every function here expects the caller to hold lock().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

#define STAND_IN_API extern "C" __attribute__((visibility("default")))

namespace stand_in {

// One lock for all state. Recursive: a kernel that runs under it may ask for the blocks it may touch.
std::unique_lock<std::recursive_mutex> lock();

// ---- errors.cpp ----
// The error of a CUDA call that a GPU would refuse as well; what cudaGetLastError returns next.
cudaError_t error(cudaError_t code);
// A fault: a use of CUDA that the stand-in finds wrong. The text is kept for stand_in_faults(), and
// cudaGetErrorString returns it for the code in this host thread.
cudaError_t fault(cudaError_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// A fault that is no call's error.
void report(const std::string& text);
// Makes a launch error that nobody has fetched a fault; called before the next launch.
void check_that_launch_errors_were_fetched();
void remember_launch_error(const std::string& kernel);

// ---- devices.cpp ----
int device_count();
int processors();
int max_shared_bytes();  // of a block
int current_device();

// ---- memory.cpp ----
struct Span {
  const char* begin = nullptr;
  size_t size = 0;
  bool holds(const void* at) const { return at >= begin && at < begin + size; }
};
struct Block {
  Span span;
  int device = 0;
  void* stream = nullptr;             // the caching allocator's blocks: the stream they were allocated on
  unsigned long long capture_id = 0;  // of the capture during which it was allocated
};
// The device whose address range holds this address; -1 for none.
int device_of(const void* at);
// The live block of cudaMalloc or of the caching allocator that holds this address.
const Block* live_block(const void* at);
// Why there is none: never allocated, or freed.
std::string why_not_live(const void* at);
bool is_mapped_host_memory(const void* at);
bool is_pinned(const void* at);
// NaN in every floating type, and under AddressSanitizer out of reach.
void poison(Span span);
void unpoison(Span span);

// ---- streams.cpp ----
struct Graph;
struct Stream;
struct Node;
using Work = std::function<void()>;

struct Item {
  enum Kind { work, launch, wait, record } kind = work;
  std::string name;
  Work run;                  // work, launch
  std::vector<Span> blocks;  // launch: what its arguments point to
  Stream* stream = nullptr;  // wait: for what this stream held up to `until`
  uint64_t until = 0;
  uint64_t number = 0;  // its place in its stream
};

// nullptr, with a fault, if it is none. Each device has a default stream.
Stream* stream_of(cudaStream_t handle, int device = current_device());
int device_of(const Stream& stream);
Graph* captured_by(const Stream& stream);
// Queues work, or adds a node to the graph that captures the stream.
void enqueue(Stream& stream, Item item);
// Runs what a stream holds, with all that it waits for.
void run(Stream& stream);
void run_device(int device);
void run_everything();
// Queued launches that use the block and that its stream's next item would not wait for.
std::string launch_that_still_uses(const Block& block);
// Whether the calling host thread may synchronize, read back or allocate; a fault or an error if not.
cudaError_t check_that_host_may(const char* what, Stream* stream = nullptr);
// A failure of a kernel that ran since the last call, as the error of the call that made it run.
cudaError_t failure_of_kernels();

// ---- graphs.cpp ----
// During capture, in place of a queue: adds a node after all that the stream has captured or waited for.
void add_node(Stream& stream, Item item);
unsigned long long capture_id(const Stream& stream);
bool any_capture_forbids_unsafe_calls();

// ---- launches.cpp ----
void count(uint64_t stand_in_counts::* counter, uint64_t by = 1);
void record_allocation(size_t bytes);

}  // namespace stand_in
