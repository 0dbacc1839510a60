// ---------------------------------------------------------------------------------------------------------------
// Driver: what Triton and torch's allocator of expandable segments call.
// Kept: the current context is the thread's current device.

static CUcontext context_of(int index) {
  return CUcontext(uintptr_t(index + 16));
}

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int* out) {
  *out = DRIVER_VERSION;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* out, int index) {
  *out = index;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* out) {
  *out = DEVICES;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* out, CUdevice_attribute which, CUdevice) {
  *out = attribute(which);  // both numberings are the same
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice index) {
  context[index] = true;
  *out = context_of(index);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned* flags, int* active) {
  *flags = 0;
  *active = context[index];
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* out) {
  *out = context_of(device);
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) device = int(uintptr_t(context)) - 16;
  return CUDA_SUCCESS;
}

static thread_local std::vector<int> pushed_devices;

API CUresult cuCtxPushCurrent_v2(CUcontext context) {
  pushed_devices.push_back(device);
  return cuCtxSetCurrent(context);
}

API CUresult cuCtxPopCurrent_v2(CUcontext* out) {
  if (pushed_devices.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (out) *out = context_of(device);
  device = pushed_devices.back();
  pushed_devices.pop_back();
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t* out, CUlimit) {
  *out = 1 << 20;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

API CUresult cuGetErrorString(CUresult error, const char** out) {
  *out = cudaGetErrorString(cudaError_t(error));  // both numberings are the same
  return CUDA_SUCCESS;
}

static std::atomic<uintptr_t> next_handle{1 << 20};

API CUresult cuModuleLoadData(CUmodule* out, const void*) {
  BEGIN_DRIVER(N_module);
  if (forbidden("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *out = CUmodule(next_handle++);
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(out, image);
}

API CUresult cuModuleLoad(CUmodule* out, const char*) {
  return cuModuleLoadData(out, nullptr);
}

API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

API CUresult cuModuleGetFunction(CUfunction* out, CUmodule, const char* name) {
  *out = CUfunction(next_handle++);
  name_kernel(*out, std::string("triton:") + name);
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* out, CUfunction_attribute which, CUfunction) {
  *out = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuOccupancyMaxActiveClusters(int* out, CUfunction, const CUlaunchConfig*) {
  *out = 1;
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, CUfunction, int, size_t) {
  *out = 4;
  return CUDA_SUCCESS;
}

// Every Triton kernel here has a pointer as its first argument.
static CUresult driver_launch(CUfunction function, CUstream handle, void** arguments) {
  BEGIN_DRIVER(N_launch);
  if (fast) return CUDA_SUCCESS;
  const void* memory = arguments ? *static_cast<void**>(arguments[0]) : nullptr;
  return CUresult(launch(kernel_name(function), handle, memory));
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  return driver_launch(function, config->hStream, arguments);
}

API CUresult cuLaunchKernel(
    CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream handle,
    void** arguments, void**) {
  return driver_launch(function, handle, arguments);
}

API CUresult cuLaunchCooperativeKernel(
    CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream handle,
    void** arguments) {
  return driver_launch(function, handle, arguments);
}

API CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr address) {
  Lock lock(memory_mutex);
  const Range* range = range_of(reinterpret_cast<void*>(address));
  if (!range) return CUDA_ERROR_INVALID_VALUE;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(out) = address; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(out) = context_of(range->device); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *static_cast<unsigned*>(out) = range->kind; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(out) = range->device; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

API CUresult cuTensorMapEncodeTiled(
    CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------
// Driver: virtual memory, for PYTORCH_ALLOC_CONF=expandable_segments:True.
// Kept: created memory counts as given out until it is released. Ignored: mapping; a reserved range can be written.

struct Physical {
  size_t size;
  int device;
};

API CUresult cuMemGetAllocationGranularity(
    size_t* out, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *out = GRANULARITY;
  return CUDA_SUCCESS;
}

API CUresult cuMemCreate(
    CUmemGenericAllocationHandle* out, size_t size, const CUmemAllocationProp* wanted, unsigned long long) {
  int on = wanted ? wanted->location.id : device;
  BEGIN_DRIVER(N_malloc);
  Lock lock(memory_mutex);
  if (!charge(on, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = CUmemGenericAllocationHandle(new Physical{size, on});
  return CUDA_SUCCESS;
}

API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  auto memory = reinterpret_cast<Physical*>(handle);
  Lock lock(memory_mutex);
  used[memory->device] -= memory->size;
  delete memory;
  return CUDA_SUCCESS;
}

API CUresult cuMemAddressReserve(CUdeviceptr* out, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* pages = new_pages(size);
  if (!pages) return CUDA_ERROR_OUT_OF_MEMORY;
  Lock lock(memory_mutex);
  ranges[uintptr_t(pages)] = {size, DEVICE, device};
  *out = CUdeviceptr(pages);
  return CUDA_SUCCESS;
}

API CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  Lock lock(memory_mutex);
  munmap(reinterpret_cast<void*>(address), size);
  ranges.erase(uintptr_t(address));
  return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}

API CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  counts[N_free]++;
  wait_for_all();
  madvise(reinterpret_cast<void*>(address), size, MADV_DONTNEED);
  return CUDA_SUCCESS;
}

API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  Lock lock(memory_mutex);
  uintptr_t start = 0;
  const Range* range = range_of(reinterpret_cast<void*>(address), &start);
  if (!range) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = start;
  if (size) *size = range->size;
  return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------
// NVML, which torch asks before it makes expandable segments, and for messages on memory: no links, no processes.

API int nvmlInit() { return 0; }
API int nvmlInit_v2() { return 0; }

API int nvmlDeviceGetCount_v2(unsigned* out) {
  *out = DEVICES;
  return 0;
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** out) {
  *out = reinterpret_cast<void*>(64);
  return 0;
}

API int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return 0; }  // the state stays as the caller set it: no fabric

API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return 0;
}
