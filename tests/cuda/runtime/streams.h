// Streams and graphs: shared by streams.cpp and graphs.cpp.
#pragma once

#include <deque>
#include <thread>

#include "runtime.h"

namespace stand_in {

struct Node {
  Item item;
  std::vector<Node*> after;  // predecessors
  size_t index = 0;
};

struct Graph {
  unsigned long long id = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalid = false;
  std::vector<std::unique_ptr<Node>> nodes;
};

struct Stream {
  int device = 0;
  bool is_default = false;
  bool blocking = true;  // synchronizes with the default stream
  int priority = 0;
  std::deque<Item> queue;
  uint64_t last = 0, done = 0;  // numbers of the last enqueued item and of the last item that ran
  uint64_t queued_at = 0;       // time of the last enqueue, on a clock shared by all streams
  int queries = 0;              // since the last item was enqueued
  std::shared_ptr<Graph> capture;
  std::vector<Node*> captured_last;  // predecessors of the next node
};

struct Event {
  Stream* stream = nullptr;  // nullptr: never recorded
  uint64_t until = 0;        // the event is complete when the stream has run this item
  int queries = 0;
  double milliseconds = 0;  // time at which it completed
  std::shared_ptr<Graph> capture;
  std::vector<Node*> captured;
};

std::vector<Stream*>& all_streams();
void execute(Item& item);

}  // namespace stand_in
