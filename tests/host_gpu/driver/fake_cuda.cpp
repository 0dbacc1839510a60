// A CUDA that is not there: the CUDA runtime, the driver and cuBLAS on the host, under torch's real CUDA build.
//
// Device memory is host memory. Each stream is a thread that does its work in order, after a random delay if one
// is asked for. Kernels do nothing. So torch's allocator, streams, events, graph capture and dispatcher run for
// real, and so does all host code around them; results of computations mean nothing.
//
// It is one unit in several files, included below. The head of each section says what it keeps of CUDA's rules and
// what it ignores. Every other function that torch or Triton could call is a generated stub (make_stubs.py).
// Globals are never destroyed, because the threads of the streams outlive main.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

using Lock = std::lock_guard<std::mutex>;
using Op = std::function<void()>;

#include "settings.h"
#include "memory.h"
#include "streams.h"
#include "capture.h"
#include "runtime_memory.h"
#include "runtime_devices.h"
#include "runtime_streams.h"
#include "runtime_graphs.h"
#include "launches.h"
#include "cuda_driver.h"
#include "cublas.h"

// ---------------------------------------------------------------------------------------------------------------
// What tests ask. See fake_cuda.py.

API const char* fake_counters() { return COUNTER_NAMES; }
API long fake_count(int counter) { return counts[counter]; }

// bytes of a device that are given out now, and the most that were since the last reset
API size_t fake_used(int index) {
  Lock lock(memory_mutex);
  return used[index];
}

API size_t fake_most(int index, int reset) {
  Lock lock(memory_mutex);
  size_t peak = most[index];
  if (reset) most[index] = used[index];
  return peak;
}

// to be called before the program asks how much there is, because torch asks once
API void fake_set_total(size_t bytes) { total = bytes; }

API int fake_has_context(int index) { return context[index]; }
API void fake_take(int index, long size) { take(index, size); }

// another program takes memory of the device that makes the nth malloc from now on
API void fake_take_at(long nth, size_t size) {
  taken_then = size;
  taken_at = nth;
}

// see "Failures" in settings.h; whether there is such a kind
API int fake_fail(const char* kind, long nth, int error, long times) { return ask_to_fail(kind, nth, error, times); }

API void fake_set_delays(long any, long copy, long launch) {
  any_delay = any;
  copy_delay = copy;
  launch_delay = launch;
}

API void fake_set_fast(int on) { fast = on != 0; }

// "count name" lines of what was launched since the last reset; owned by the library until the next call
API const char* fake_launched(int reset) {
  static auto& text = *new std::string;
  Lock lock(memory_mutex);
  text.clear();
  for (auto& [name, count] : launched) text += std::to_string(count) + " " + name + "\n";
  if (reset) launched.clear();
  return text.c_str();
}

// what the stubs of functions that are not here call
API int fake_missing(const char* name) {
  static auto& said = *new std::map<std::string, bool>;
  Lock lock(memory_mutex);
  if (!std::exchange(said[name], true)) fprintf(stderr, "[fake] %s is not here\n", name);
  return cudaErrorNotSupported;
}
