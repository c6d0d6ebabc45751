// Streams and graphs, for streams.cpp and graphs.cpp.
#pragma once

#include <deque>
#include <thread>

#include "runtime.h"

namespace stand_in {

struct Node {
  Item item;
  std::vector<Node*> after;  // these come first
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
  bool blocking = true;  // ordered with the default stream
  int priority = 0;
  std::deque<Item> queue;
  uint64_t last = 0, done = 0;  // the numbers of the item queued last and of the one run last
  uint64_t queued_at = 0;       // on a clock of all streams
  int queries = 0;              // since the last item
  std::shared_ptr<Graph> capture;
  std::vector<Node*> captured_last;  // what the next node comes after
};

struct Event {
  Stream* stream = nullptr;  // none: never recorded
  uint64_t until = 0;        // complete once its stream has run this item
  int queries = 0;
  double milliseconds = 0;  // when it was reached
  std::shared_ptr<Graph> capture;
  std::vector<Node*> captured;
};

std::vector<Stream*>& all_streams();
void execute(Item& item);

}  // namespace stand_in
