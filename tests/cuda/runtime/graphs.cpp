// Graphs. In a capture, each item that would be enqueued becomes a node. A graph launch runs the nodes with
// the captured arguments, in the order that differs most from the capture order and is allowed by the
// dependencies.
#include <algorithm>
#include <set>
#include <utility>

#include "streams.h"

namespace stand_in {
namespace {

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
unsigned long long captures = 0;

using Handle = std::shared_ptr<Graph>;  // the target of a cudaGraph_t and a cudaGraphExec_t

std::vector<Stream*> streams_of(const Graph& graph) {
  std::vector<Stream*> streams;
  for (Stream* stream : all_streams()) {
    if (stream->capture.get() == &graph) streams.push_back(stream);
  }
  return streams;
}

void collect(Node* node, std::set<Node*>& found) {
  if (!found.insert(node).second) return;
  for (Node* before : node->after) collect(before, found);
}

// Of the nodes whose predecessors have run, the one captured last runs first.
void replay(const Graph& graph) {
  std::vector<size_t> missing(graph.nodes.size());
  std::vector<std::vector<size_t>> next(graph.nodes.size());
  std::set<size_t, std::greater<size_t>> ready;
  for (const auto& node : graph.nodes) {
    missing[node->index] = node->after.size();
    for (const Node* before : node->after) next[before->index].push_back(node->index);
    if (node->after.empty()) ready.insert(node->index);
  }
  while (!ready.empty()) {
    const size_t index = *ready.begin();
    ready.erase(ready.begin());
    execute(graph.nodes[index]->item);
    for (size_t after : next[index]) {
      if (--missing[after] == 0) ready.insert(after);
    }
  }
}

}  // namespace

void add_node(Stream& stream, Item item) {
  auto node = std::make_unique<Node>();
  node->item = std::move(item);
  node->after = stream.captured_last;
  node->index = stream.capture->nodes.size();
  stream.captured_last = {node.get()};
  stream.capture->nodes.push_back(std::move(node));
}

unsigned long long capture_id(const Stream& stream) {
  return stream.capture == nullptr ? 0 : stream.capture->id;
}

bool any_capture_forbids_unsafe_calls() {
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return false;
  bool forbidden = false;
  for (Stream* stream : all_streams()) {
    Graph* const graph = stream->capture.get();
    if (graph == nullptr || graph->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool own = graph->thread == std::this_thread::get_id();
    const bool global =
        graph->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
    if (!own && !global) continue;
    graph->invalid = true;
    forbidden = true;
  }
  return forbidden;
}

}  // namespace stand_in

using namespace stand_in;

STAND_IN_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->is_default || stream->capture != nullptr) return error(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Graph>();
  stream->capture->id = ++captures;
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  stream->captured_last.clear();
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  const auto guard = lock();
  *result = nullptr;
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (stream->capture == nullptr) return error(cudaErrorIllegalState);
  const Handle graph = stream->capture;
  std::set<Node*> joined;
  for (Node* node : stream->captured_last) collect(node, joined);
  for (Stream* other : streams_of(*graph)) {
    other->capture.reset();
    other->captured_last.clear();
  }
  if (graph->invalid) return error(cudaErrorStreamCaptureInvalidated);
  if (joined.size() != graph->nodes.size())
    return fault(cudaErrorStreamCaptureUnjoined,
                 "the capture ended with work that its stream has not joined");
  *result = reinterpret_cast<cudaGraph_t>(new Handle(graph));
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const auto guard = lock();
  const Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                                  unsigned long long* id, cudaGraph_t* graph,
                                                  const cudaGraphNode_t** dependencies,
                                                  const cudaGraphEdgeData**, size_t* count) {
  const auto guard = lock();
  const cudaError_t failed = cudaStreamIsCapturing(handle, status);
  if (failed != cudaSuccess) return failed;
  Stream* const stream = stream_of(handle);
  if (id != nullptr) *id = capture_id(*stream);
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(&stream->capture);
  if (dependencies != nullptr)
    *dependencies = reinterpret_cast<const cudaGraphNode_t*>(stream->captured_last.data());
  if (count != nullptr) *count = stream->captured_last.size();
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  const auto guard = lock();
  const Graph& all = **reinterpret_cast<Handle*>(graph);
  for (size_t i = 0; nodes != nullptr && i < std::min(*count, all.nodes.size()); ++i)
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(all.nodes[i].get());
  *count = all.nodes.size();
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* result, cudaGraph_t graph,
                                                       unsigned long long) {
  const auto guard = lock();
  *result = reinterpret_cast<cudaGraphExec_t>(new Handle(*reinterpret_cast<Handle*>(graph)));
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const auto guard = lock();
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  Item item;
  item.name = "graph";
  item.run = [graph = *reinterpret_cast<Handle*>(executable)] { replay(*graph); };
  enqueue(*stream, std::move(item));
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const auto guard = lock();
  delete reinterpret_cast<Handle*>(graph);
  return cudaSuccess;
}

STAND_IN_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const auto guard = lock();
  delete reinterpret_cast<Handle*>(executable);
  return cudaSuccess;
}
