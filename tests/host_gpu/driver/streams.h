// ---------------------------------------------------------------------------------------------------------------
// Streams.
// Kept: work of one stream is done in order, that of different streams in any order, after random delays.
// Ignored: the legacy default stream does not wait for others; the one of a thread is the same stream as the
// legacy one; priorities are stored only; a destroyed stream lives on.

struct Capture;

struct Stream {
  const int device, priority;

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Op> queue;
  bool busy = false;
  std::mt19937 random;

  // while it is captured; capture_mutex guards these
  std::shared_ptr<Capture> capture;
  std::map<Stream*, long> seen;  // how many captured operations of each stream are behind this one's end

  Stream(int device, int priority, unsigned seed) : device(device), priority(priority), random(seed) {
    std::thread([this] { run(); }).detach();
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return !queue.empty(); });
      Op op = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      delay(any_delay);
      op();
      op = nullptr;
      lock.lock();
      busy = false;
      if (queue.empty()) changed.notify_all();
    }
  }

  // evenly from 0 to twice the usual delay, and one time in sixteen eight times that
  void delay(long usual) {
    if (!usual) return;
    long micros = random() % (2 * usual + 1);
    if (random() % 16 == 0) micros *= 8;
    std::this_thread::sleep_for(std::chrono::microseconds(micros));
  }

  void push(Op op) {
    {
      Lock lock(mutex);
      queue.push_back(std::move(op));
    }
    changed.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return queue.empty() && !busy; });
  }

  bool idle() {
    Lock lock(mutex);
    return queue.empty() && !busy;
  }
};

static std::mutex streams_mutex;
static auto& streams = *new std::vector<Stream*>;
static Stream* default_streams[16];

// streams_mutex is held
static Stream* new_stream(int priority) {
  auto stream = new Stream(device, priority, unsigned(streams.size() + 17 * SEED));
  streams.push_back(stream);
  return stream;
}

static bool is_default(cudaStream_t handle) {
  return handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
}

static Stream* stream_of(cudaStream_t handle) {
  if (!is_default(handle)) return reinterpret_cast<Stream*>(handle);
  Lock lock(streams_mutex);
  if (!default_streams[device]) default_streams[device] = new_stream(0);
  return default_streams[device];
}

static void wait_for_all() {
  std::vector<Stream*> all;
  {
    Lock lock(streams_mutex);
    all = streams;
  }
  for (Stream* stream : all) stream->wait();
}
