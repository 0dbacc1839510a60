// ---------------------------------------------------------------------------------------------------------------
// Runtime: capture and graphs.

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  BEGIN(-1);
  if (is_default(handle)) return fail(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  Stream* stream = stream_of(handle);
  Lock lock(capture_mutex);
  if (stream->capture) return fail(cudaErrorIllegalState, "the stream is captured already");
  auto capture = std::make_shared<Capture>();
  capture->id = next_capture++;
  capture->origin = stream;
  capture->owner = std::this_thread::get_id();
  capture->mode = mode;
  captures.push_back(capture);
  stream->capture = capture;
  stream->seen.clear();
  capturing++;
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCaptureToGraph(
    cudaStream_t handle, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
    cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(handle, mode);
}

// Whether all that the capture's other streams did is behind the end of its first one.
static bool joined(const Capture& capture) {
  for (Stream* stream : streams) {
    if (stream->capture.get() != &capture) continue;
    if (capture.origin->seen[stream] < stream->seen[stream]) return false;
  }
  return true;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Stream* stream = stream_of(handle);
  Lock lock(capture_mutex);
  Lock streams_lock(streams_mutex);
  auto capture = stream->capture;
  *out = nullptr;
  if (!capture || capture->origin != stream) return fail(cudaErrorIllegalState, "no capture to end");
  cudaError_t error = capture->invalid ? cudaErrorStreamCaptureInvalidated
                      : joined(*capture) ? cudaSuccess
                                         : cudaErrorStreamCaptureUnjoined;
  capture->open = false;
  for (Stream* each : streams) {
    if (each->capture != capture) continue;
    each->capture = nullptr;
    each->seen.clear();
  }
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  capturing--;
  if (error) return fail(error, "end of a capture");
  *out = reinterpret_cast<cudaGraph_t>(new Graph(capture));
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* out) {
  auto capture = capture_of(stream_of(handle));
  *out = !capture             ? cudaStreamCaptureStatusNone
         : capture->invalid ? cudaStreamCaptureStatusInvalidated
                            : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* node_count) {
  cudaStreamIsCapturing(handle, status);
  auto capture = capture_of(stream_of(handle));
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? GRAPH_IN_CAPTURE : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (node_count) *node_count = 0;
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

API cudaError_t cudaStreamUpdateCaptureDependencies(
    cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, unsigned) {
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  BEGIN(N_graph_launch);
  Graph graph = *reinterpret_cast<Graph*>(exec);
  enqueue(stream_of(handle), [graph] {
    for (auto& op : graph->ops) op();
  });
  return cudaSuccess;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (graph != GRAPH_IN_CAPTURE) delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Graph*>(exec);
  return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph && graph != GRAPH_IN_CAPTURE ? (*reinterpret_cast<Graph*>(graph))->ops.size() : 0;
  return cudaSuccess;
}

API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}
