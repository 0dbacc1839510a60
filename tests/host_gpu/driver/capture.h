// ---------------------------------------------------------------------------------------------------------------
// Capture and graphs.
// Kept: a captured stream does nothing and records; other streams join by waiting for a captured event, and must be
// joined back before the end; calls that capture forbids invalidate it, by the modes of the capture and of the
// calling thread; a wait for work outside the capture invalidates it too.
// Ignored: branches of a graph run one after the other, in the order of recording; nodes cannot be looked at or
// changed.

struct Capture {
  unsigned long long id;
  Stream* origin;
  std::thread::id owner;
  cudaStreamCaptureMode mode;
  bool open = true, invalid = false;
  std::vector<Op> ops;
};

using Graph = std::shared_ptr<Capture>;

static std::mutex capture_mutex;
static auto& captures = *new std::vector<std::shared_ptr<Capture>>;  // those that are open
static std::atomic<int> capturing{0};                                // how many
static unsigned long long next_capture = 1;
static const cudaGraph_t GRAPH_IN_CAPTURE = cudaGraph_t(8);

static std::shared_ptr<Capture> capture_of(Stream* stream) {
  if (!capturing) return nullptr;
  Lock lock(capture_mutex);
  return stream->capture;
}

static void forbid(Capture& capture, const char* what) {
  capture.invalid = true;
  counts[N_forbidden]++;
  fprintf(stderr, "[fake] forbidden in a capture: %s\n", what);
}

// Whether a call that may wait for the device, or allocates, is forbidden now; it invalidates the capture.
static bool forbidden(const char* what) {
  if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed) return false;
  Lock lock(capture_mutex);
  for (auto& capture : captures) {
    bool own = capture->owner == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (!own && !global) continue;
    forbid(*capture, what);
    return true;
  }
  return false;
}

// The same for a call on one stream, which only matters if that stream is captured.
static bool forbidden_on(Stream* stream, const char* what) {
  auto capture = capture_of(stream);
  if (capture) forbid(*capture, what);
  return capture != nullptr;
}

static void enqueue(Stream* stream, Op op) {
  if (capturing) {
    Lock lock(capture_mutex);
    if (stream->capture) {
      stream->capture->ops.push_back(std::move(op));
      stream->seen[stream]++;
      return;
    }
  }
  stream->push(std::move(op));
}

// ---------------------------------------------------------------------------------------------------------------
// Events.
// Kept: an event stands for the work queued before its last record; it belongs to a device; times are those of the
// host at which that work was done. Ignored: blocking and interprocess events.

struct Moment {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  double time = 0;

  void pass() {
    Lock lock(mutex);
    passed = true;
    time = now();
    changed.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return passed; });
  }

  bool is_passed() {
    Lock lock(mutex);
    return passed;
  }
};

struct Event {
  const unsigned flags;
  const int device;
  std::mutex mutex;                  // guards the rest
  std::shared_ptr<Moment> moment;    // of the last record; none before the first
  std::shared_ptr<Capture> capture;  // that it was recorded in, with what was behind it there
  std::map<Stream*, long> seen;

  Event(unsigned flags, int device) : flags(flags), device(device) {}

  std::shared_ptr<Moment> last(bool* captured) {
    Lock lock(mutex);
    *captured = capture != nullptr;
    return moment;
  }
};

static Event* event_of(cudaEvent_t handle) {
  return reinterpret_cast<Event*>(handle);
}
