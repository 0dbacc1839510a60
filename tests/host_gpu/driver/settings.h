// ---------------------------------------------------------------------------------------------------------------
// Settings: environment variables, read once when the library is loaded.

static long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

static const int ARCH = setting("FAKE_ARCH", 90);                 // compute capability, 75 ... 120
static const int SMS = setting("FAKE_SMS", 132);                  // multiprocessors
static const int DEVICES = std::min(16L, setting("FAKE_DEVICES", 1));
static std::atomic<size_t> total{size_t(setting("FAKE_MB", 81920)) << 20};  // memory of each device
static const size_t CONTEXT = size_t(setting("FAKE_CONTEXT_MB", 0)) << 20;  // that a context takes of its device
static const bool NO_COPY = setting("FAKE_NO_COPY", 0);           // copies write nothing to device memory
static std::atomic<long> any_delay{setting("FAKE_DELAY_US", 0)};  // usual delay before each operation of a stream
static std::atomic<long> copy_delay{0}, launch_delay{0};          // beside that, of copies to the device and of launches
static const long SEED = setting("FAKE_SEED", 0);                 // of the delays
static const bool VERBOSE = setting("FAKE_VERBOSE", 0);           // print every error that is returned
static std::atomic<bool> fast{setting("FAKE_FAST", 0) != 0};      // launches are counted and nothing else

static const int DRIVER_VERSION = CUDA_VERSION;
static const size_t PAGE = 4096;
static const size_t GRANULARITY = 2 << 20;         // of cudaMalloc and cuMemCreate
static const size_t STAGED = 64 << 10;             // up to here a copy from pageable memory returns at once

// ---------------------------------------------------------------------------------------------------------------
// Counters of calls; read them with fake_count and fake_counters. What the host waits for is counted by kind:
// `synchronize` (of a stream or the device; `device_synchronize` counts the latter alone), `event_wait` (for an
// event), `copy_wait` (a copy from or to pageable memory that returns when it is done), `free` (cudaFree waits for
// the whole device).

#define COUNTERS(X)                                                                                                \
  X(malloc) X(free) X(host_alloc) X(copy) X(copy_wait) X(launch) X(blas) X(graph_launch) X(module) X(event)        \
  X(event_query) X(event_wait) X(record) X(stream_wait) X(synchronize) X(device_synchronize) X(forbidden)          \
  X(wrong_device)

enum Counter {
#define X(name) N_##name,
  COUNTERS(X)
#undef X
  COUNTER_COUNT
};

static std::atomic<long> counts[COUNTER_COUNT];

static const char* COUNTER_NAMES =
#define X(name) #name " "
    COUNTERS(X)
#undef X
    ;

// ---------------------------------------------------------------------------------------------------------------
// State of the calling thread, and errors.
// Kept: an error stays until cudaGetLastError is called.

static thread_local int device = 0;
static thread_local int last_error = cudaSuccess;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static cudaError_t fail(int error, const char* why = "") {
  last_error = error;
  if (VERBOSE && error != cudaErrorNotReady) fprintf(stderr, "[fake] error %d %s\n", error, why);
  return cudaError_t(error);
}

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}


// ---------------------------------------------------------------------------------------------------------------
// Failures that a test asks for: the nth call of a kind from now on fails, once, several times, or for good.
// For good ("sticky") means that the device went away: from then on every call that needs a context returns the
// error, until the process ends, as after an illegal access or where a GPU fell off the bus.
// Kept: the error is returned before the call has done anything. Ignored: on a GPU the error of a kernel or of a
// copy is returned by a later call; for that, let a later call fail (`synchronize`).

struct Failure {
  long left = 0, times = 0;  // calls until the first that fails; how many fail from there on
  int error = 0;
  bool sticky = false;
};

static std::mutex failures_mutex;
static Failure failures[COUNTER_COUNT];  // failures_mutex guards it
static std::atomic<bool> failing{false};  // whether any was ever asked for
static std::atomic<int> gone{0};         // the error that sticks

static int counter_named(const std::string& name) {
  std::string names = COUNTER_NAMES;
  int index = 0;
  for (size_t start = 0, end; (end = names.find(' ', start)) != std::string::npos; start = end + 1, index++) {
    if (names.substr(start, end - start) == name) return index;
  }
  return -1;
}

// `times` 0: sticky
static bool ask_to_fail(const std::string& kind, long nth, int error, long times) {
  int counter = counter_named(kind);
  if (counter < 0 || nth < 0 || times < 0) return false;
  Lock lock(failures_mutex);
  failures[counter] = {nth, std::max(1L, times), error, times == 0};
  failing = true;
  return true;
}

// Count a call; the error that it has to return, or 0.
static int next_error(int counter) {
  if (counter >= 0) counts[counter]++;
  if (!failing) return 0;
  if (gone || counter < 0) return gone;
  Lock lock(failures_mutex);
  Failure& failure = failures[counter];
  if (failure.left == 0 || failure.left-- > 1) return 0;
  if (failure.sticky) gone = failure.error;
  if (--failure.times) failure.left = 1;
  return failure.error;
}

// FAKE_FAIL=kind:nth:error:times,...
static const bool failures_are_read = [] {
  const char* text = getenv("FAKE_FAIL");
  for (std::string left = text ? text : ""; !left.empty();) {
    std::string one = left.substr(0, left.find(','));
    left.erase(0, one.size() + 1);
    char kind[32];
    long nth = 0, error = 0, times = 1;
    int found = sscanf(one.c_str(), "%31[^:]:%ld:%ld:%ld", kind, &nth, &error, &times);
    if (found < 3 || !ask_to_fail(kind, nth, int(error), times)) {
      fprintf(stderr, "[fake] FAKE_FAIL=%s, wanted kind:nth:error[:times]\n", one.c_str());
      _Exit(2);
    }
  }
  return true;
}();
