// The stand-in runtime's own interface: for the kernels compiled for the CPU (tests/cuda/kernels), for the
// bridge to torch (tests/cuda/bridge) and, through ctypes, for Python (tests/cuda/device.py).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

extern "C" {

// ---- launches of kernels that run on the CPU ----

struct stand_in_span {
  const char* begin;
  size_t size;
};
struct stand_in_launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  cudaStream_t stream;
  const stand_in_span* parameters;  // the bytes of each argument
  size_t parameter_count;
  void* state;  // given to run, later, as often as a graph replays the launch; then to destroy
  // Runs the kernel, which may touch only these blocks. Returns nullptr, or what went wrong.
  const char* (*run)(void* state, const stand_in_span* blocks, size_t block_count);
  void (*destroy)(void* state);
};
cudaError_t stand_in_launch_kernel(const stand_in_launch* launch);

// ---- what the bridge reports from torch ----

enum stand_in_event { stand_in_allocated, stand_in_freed, stand_in_segment };
void stand_in_trace(stand_in_event event, int device, void* at, size_t size, cudaStream_t stream);
void stand_in_set_current_stream(cudaStream_t (*current_stream)(int device));
// Queues work of torch's own on a stream. `destroy` is called after the last run.
void stand_in_enqueue(cudaStream_t stream, const char* name, void (*run)(void*), void (*destroy)(void*),
                      void* state);
// Runs what the stream holds, with all that it waits for, without counting as a synchronization.
// Returns nullptr, or what went wrong in a kernel.
const char* stand_in_run_stream(cudaStream_t stream);
bool stand_in_is_capturing(cudaStream_t stream);
// An operator of torch's that waits for the device, such as equal. Returns nullptr, or why it may not.
const char* stand_in_synchronizing(const char* what);

// ---- what tests ask ----

struct stand_in_counts {
  uint64_t launches, torch_operations, synchronizations, device_allocations, allocations, allocated_bytes;
};
void stand_in_get_counts(stand_in_counts* counts);
// From now on, keeps what is launched (true) or no more (false); stand_in_launches gives it as JSON.
void stand_in_record_launches(bool on);
const char* stand_in_launches();
// The faults since the last call, one per line. What is returned lives until the next call in this thread.
const char* stand_in_faults();
// While forbidden, a synchronization, a read-back or a cudaMalloc is a fault.
void stand_in_forbid_waiting(bool on);
// Streams run in the order "latest" (the stream enqueued to last goes first), or in one seeded by a number.
void stand_in_set_order(const char* name);
// Kernels are launched, checked and counted, but not run.
void stand_in_skip_kernels(bool on);
// How cooperative launches are refused: 0 not at all, 1 the attribute says so, 2
// cudaErrorCooperativeLaunchTooLarge.
void stand_in_refuse_cooperative(int how);
size_t stand_in_live_bytes(int device);

}  // extern "C"
