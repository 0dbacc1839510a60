// ---------------------------------------------------------------------------------------------------------------
// Runtime: streams.

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
  BEGIN(-1);
  Lock lock(streams_mutex);
  *out = reinterpret_cast<cudaStream_t>(new_stream(priority));
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return cudaStreamCreateWithPriority(out, 0, 0);
}

API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* out) {
  *out = stream_of(handle)->priority;
  return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  BEGIN(-1);
  Stream* stream = stream_of(handle);
  if (forbidden_on(stream, "cudaStreamQuery")) return fail(cudaErrorStreamCaptureUnsupported);
  return stream->idle() ? cudaSuccess : fail(cudaErrorNotReady);
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  BEGIN(N_synchronize);
  Stream* stream = stream_of(handle);
  if (forbidden_on(stream, "cudaStreamSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
  stream->wait();
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  enqueue(stream_of(handle), [=] { function(data); });
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void* data, unsigned) {
  enqueue(stream_of(handle), [=] { function(handle, cudaSuccess, data); });
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Runtime: events.

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  BEGIN(N_event);
  *out = reinterpret_cast<cudaEvent_t>(new Event(flags, device));
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* out) {
  return cudaEventCreateWithFlags(out, 0);
}

API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete event_of(handle);
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  BEGIN(N_record);
  Event* event = event_of(handle);
  Stream* stream = stream_of(stream_handle);
  if (stream->device != event->device) return fail(cudaErrorInvalidResourceHandle, "event of another device");
  if (capturing) {
    Lock lock(capture_mutex);
    if (stream->capture) {
      Lock event_lock(event->mutex);
      event->capture = stream->capture;
      event->seen = stream->seen;
      return cudaSuccess;
    }
  }
  auto moment = std::make_shared<Moment>();
  {
    Lock event_lock(event->mutex);
    event->capture = nullptr;
    event->moment = moment;
  }
  stream->push([moment] { moment->pass(); });
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  BEGIN(N_event_query);
  if (forbidden("cudaEventQuery")) return fail(cudaErrorStreamCaptureUnsupported);
  bool captured;
  auto moment = event_of(handle)->last(&captured);
  if (captured) return fail(cudaErrorCapturedEvent);
  return !moment || moment->is_passed() ? cudaSuccess : fail(cudaErrorNotReady);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  BEGIN(N_event_wait);
  if (forbidden("cudaEventSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
  bool captured;
  auto moment = event_of(handle)->last(&captured);
  if (captured) return fail(cudaErrorCapturedEvent);
  if (moment) moment->wait();
  return cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  bool captured;
  auto first = event_of(from)->last(&captured), second = event_of(to)->last(&captured);
  if (!first || !second) return fail(cudaErrorInvalidResourceHandle, "time of an event that was not recorded");
  if ((event_of(from)->flags | event_of(to)->flags) & cudaEventDisableTiming) {
    return fail(cudaErrorInvalidResourceHandle, "time of an event without timing");
  }
  if (!first->is_passed() || !second->is_passed()) return fail(cudaErrorNotReady);
  *milliseconds = float((second->time - first->time) * 1e3);
  return cudaSuccess;
}

// A wait inside a capture: the stream has seen what the event has seen.
static cudaError_t wait_in_capture(Stream* stream, Event* event) {
  if (!event->capture) {
    if (!event->moment) return cudaSuccess;
    forbid(*stream->capture, "wait for work outside the capture");
    return fail(cudaErrorStreamCaptureIsolation);
  }
  if (!event->capture->open) return fail(cudaErrorCapturedEvent);
  if (stream->capture && stream->capture != event->capture) {
    forbid(*stream->capture, "wait for an event of another capture");
    forbid(*event->capture, "its event is waited for in another capture");
    return fail(cudaErrorStreamCaptureMerge);
  }
  stream->capture = event->capture;
  for (auto& [other, count] : event->seen) stream->seen[other] = std::max(stream->seen[other], count);
  return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
  BEGIN(N_stream_wait);
  Stream* stream = stream_of(stream_handle);
  Event* event = event_of(handle);
  {
    Lock lock(capture_mutex);
    Lock event_lock(event->mutex);
    if (stream->capture || event->capture) return wait_in_capture(stream, event);
  }
  bool captured;
  auto moment = event->last(&captured);
  if (moment) stream->push([moment] { moment->wait(); });
  return cudaSuccess;
}
