// ---------------------------------------------------------------------------------------------------------------
// Runtime: memory.

API cudaError_t cudaMalloc(void** out, size_t size) {
  BEGIN(N_malloc);
  if (forbidden("cudaMalloc")) return fail(cudaErrorStreamCaptureUnsupported);
  return allocate(out, size, DEVICE);
}

API cudaError_t cudaFree(void* address) {
  BEGIN(address ? N_free : -1);  // cudaFree(nullptr) is a usual way to make a context
  if (!address) return cudaSuccess;
  if (forbidden("cudaFree")) return fail(cudaErrorStreamCaptureUnsupported);
  wait_for_all();
  return release(address);
}

API cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t) {
  return cudaMalloc(out, size);
}

API cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
  return cudaFree(address);
}

API cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) {
  BEGIN(N_host_alloc);
  if (forbidden("cudaHostAlloc")) return fail(cudaErrorStreamCaptureUnsupported);
  return allocate(out, size, PINNED);
}

API cudaError_t cudaFreeHost(void* address) {
  BEGIN(-1);
  if (!address) return cudaSuccess;
  wait_for_all();
  return release(address);
}

API cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  BEGIN(N_host_alloc);
  Lock lock(memory_mutex);
  ranges[uintptr_t(address)] = {size, PINNED, device};
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* address) {
  Lock lock(memory_mutex);
  ranges.erase(uintptr_t(address));
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
  Lock lock(memory_mutex);
  memset(out, 0, sizeof *out);
  const Range* range = range_of(address);
  if (!range) {
    out->type = cudaMemoryTypeUnregistered;
    out->device = -1;
    return cudaSuccess;
  }
  out->type = range->kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  out->device = range->device;
  out->devicePointer = const_cast<void*>(address);
  out->hostPointer = range->kind == PINNED ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
  BEGIN(-1);
  Lock lock(memory_mutex);
  *all = total;
  *free = free_bytes(device);
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  static auto& addresses = *new std::map<std::pair<const void*, int>, void*>;
  static std::mutex mutex;
  Lock lock(mutex);
  void*& address = addresses[{symbol, device}];
  if (!address) address = new_pages(PAGE);  // a part of the context
  *out = address;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* out, int) {
  *out = cudaMemPool_t(8);
  return cudaSuccess;
}

API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* out) {
  *static_cast<uint64_t*>(out) = 0;
  return cudaSuccess;
}

API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------
// Runtime: copies.
// Kept: done in the order of the stream, with the bytes that are there then; a copy from pageable memory takes its
// bytes at once and waits if it is large; one to pageable memory waits. With FAKE_NO_COPY nothing is written to
// device memory, so that it needs none of the host's: it reads as zeros. Ignored: bandwidth.

static bool moves_nothing(const void* to) {
  return NO_COPY && kind_of(to) == DEVICE;
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  BEGIN(N_copy);
  Stream* stream = stream_of(handle);
  bool from_pageable = kind_of(from) == PAGEABLE, to_pageable = kind_of(to) == PAGEABLE;
  if ((from_pageable || to_pageable) && forbidden_on(stream, "copy from or to pageable memory")) {
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (moves_nothing(to)) {
    enqueue(stream, [] {});
  } else if (from_pageable) {
    auto bytes = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(bytes, bytes + size);
    enqueue(stream, [=] { memcpy(to, staged->data(), size); });
  } else {
    bool upload = kind_of(from) == PINNED;
    enqueue(stream, [=] {
      if (upload) stream->delay(copy_delay);
      memcpy(to, from, size);
    });
  }
  if (to_pageable || (from_pageable && size > STAGED)) {
    counts[N_copy_wait]++;
    stream->wait();
  }
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (forbidden("cudaMemcpy")) return fail(cudaErrorStreamCaptureUnsupported);
  cudaError_t error = cudaMemcpyAsync(to, from, size, kind, nullptr);
  stream_of(nullptr)->wait();
  return error;
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t handle) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, handle);
}

// constants of kernels, which read nothing
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
  BEGIN(-1);
  bool nothing = moves_nothing(to);
  enqueue(stream_of(handle), [=] {
    if (!nothing) memset(to, value, size);
  });
  return cudaSuccess;
}

API cudaError_t cudaMemset(void* to, int value, size_t size) {
  cudaError_t error = cudaMemsetAsync(to, value, size, nullptr);
  stream_of(nullptr)->wait();
  return error;
}
