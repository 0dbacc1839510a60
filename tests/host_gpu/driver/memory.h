// ---------------------------------------------------------------------------------------------------------------
// Memory.
// Kept: what each device has given out, its peak and its limit; whether an address is device, pinned or pageable
// memory, and of which device; a context takes FAKE_CONTEXT_MB of its device at the first call that needs one;
// other programs take memory too (fake_take). Device memory is given out in units of 2 MiB: a driver maps that much
// at least, and gives small pieces of one unit to several calls, but torch's allocator asks for 2 MiB or more, so
// each call is rounded up here. Ignored: fragmentation.

enum Kind { PAGEABLE = 0, PINNED = 1, DEVICE = 2 };  // the last two as CU_MEMORYTYPE_HOST and _DEVICE

struct Range {
  size_t size;
  Kind kind;
  int device;
};

static std::mutex memory_mutex;
static auto& ranges = *new std::map<uintptr_t, Range>;
static size_t used[16], most[16];
static size_t taken[16];                           // by other programs
static std::atomic<bool> context[16];              // whether this process has one
static std::atomic<long> taken_at{0};              // mallocs until another program takes `taken_then`
static size_t taken_then;

static void* new_pages(size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}

// memory_mutex is held, as in the functions below that have no lock of their own
static size_t free_bytes(int on) {
  size_t gone_bytes = used[on] + taken[on] + (context[on] ? CONTEXT : 0);
  return total - std::min(size_t(total), gone_bytes);
}

static bool charge(int on, size_t size) {
  if (size > free_bytes(on)) return false;
  used[on] += size;
  most[on] = std::max(most[on], used[on]);
  return true;
}

static const Range* range_of(const void* address, uintptr_t* base = nullptr) {
  auto next = ranges.upper_bound(uintptr_t(address));
  if (next == ranges.begin()) return nullptr;
  auto found = std::prev(next);
  if (uintptr_t(address) >= found->first + found->second.size) return nullptr;
  if (base) *base = found->first;
  return &found->second;
}

static Kind kind_of(const void* address) {
  Lock lock(memory_mutex);
  const Range* range = range_of(address);
  return range ? range->kind : PAGEABLE;
}

static cudaError_t allocate(void** out, size_t size, Kind kind) {
  size_t unit = kind == DEVICE ? GRANULARITY : PAGE;
  size = std::max(unit, (size + unit - 1) / unit * unit);
  Lock lock(memory_mutex);
  if (kind == DEVICE && !charge(device, size)) return fail(cudaErrorMemoryAllocation);
  void* pages = new_pages(size);
  if (!pages) {
    if (kind == DEVICE) used[device] -= size;
    return fail(cudaErrorMemoryAllocation, "the host has no more memory");
  }
  ranges[uintptr_t(pages)] = {size, kind, device};
  *out = pages;
  return cudaSuccess;
}

static cudaError_t release(void* address) {
  Lock lock(memory_mutex);
  auto found = ranges.find(uintptr_t(address));
  if (found == ranges.end()) return fail(cudaErrorInvalidValue, "free of an unknown address");
  Range range = found->second;
  if (range.kind == DEVICE) used[range.device] -= range.size;
  munmap(address, range.size);
  ranges.erase(found);
  return cudaSuccess;
}


// Another program takes memory of a device, as much as is free at most, or gives it back.
static void take(int on, long size) {
  Lock lock(memory_mutex);
  if (size < 0) {
    taken[on] -= std::min(taken[on], size_t(-size));
  } else {
    taken[on] += std::min(free_bytes(on), size_t(size));
  }
}

// The begin of a call that needs a context: counts it (-1: no counter), makes the context, and tells the error that
// the call has to return.
static int begin(int counter = -1) {
  context[device] = true;
  if (counter == N_malloc && taken_at && --taken_at == 0) take(device, long(taken_then));
  return next_error(counter);
}

#define BEGIN(counter) \
  if (int error_ = begin(counter)) return fail(error_)
#define BEGIN_DRIVER(counter) \
  if (int error_ = begin(counter)) return CUresult(error_)
