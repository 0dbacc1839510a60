// ---------------------------------------------------------------------------------------------------------------
// Launches, of the runtime, the driver and cuBLAS.
// Kept: place in the stream, name, number, and whether stream, memory and current device belong together.
// Ignored: the computation, launch errors, shared memory and registers.

static auto& kernel_names = *new std::unordered_map<const void*, std::string>;  // memory_mutex guards both
static auto& launched = *new std::map<std::string, long>;

static std::string kernel_name(const void* function) {
  Lock lock(memory_mutex);
  auto found = kernel_names.find(function);
  return found == kernel_names.end() ? "?" : found->second;
}

static void name_kernel(const void* function, std::string name) {
  Lock lock(memory_mutex);
  kernel_names[function] = std::move(name);
}

static bool wrong_device(const std::string& name, Stream* stream, const void* memory) {
  int of_memory = device;
  {
    Lock lock(memory_mutex);
    const Range* range = memory ? range_of(memory) : nullptr;
    if (range && range->kind == DEVICE) of_memory = range->device;
  }
  if (stream->device == device && of_memory == device) return false;
  counts[N_wrong_device]++;
  fprintf(stderr, "[fake] %s launched on device %d with a stream of %d and memory of %d\n", name.c_str(), device,
          stream->device, of_memory);
  return true;
}

// `memory`: an address that the kernel was given, if one is known
static int launch(const std::string& name, cudaStream_t handle, const void* memory = nullptr) {
  Stream* stream = stream_of(handle);
  if (DEVICES > 1 && wrong_device(name, stream, memory)) return cudaErrorInvalidResourceHandle;
  {
    Lock lock(memory_mutex);
    launched[name]++;
  }
  enqueue(stream, [=] { stream->delay(launch_delay); });
  return cudaSuccess;
}

static cudaError_t runtime_launch(const void* function, cudaStream_t handle) {
  BEGIN(N_launch);
  if (fast) return cudaSuccess;
  int error = launch(kernel_name(function), handle);
  return error ? fail(error) : cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t handle) {
  return runtime_launch(function, handle);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return runtime_launch(function, config->stream);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3, dim3, void**, size_t, cudaStream_t handle) {
  return runtime_launch(function, handle);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = cudaKernel_t(function);
  return cudaSuccess;
}

static thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

// what nvcc's code calls when a library with kernels is loaded
API void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}

API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 0; }

API void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  name_kernel(function, name);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 64;
  out->ptxVersion = out->binaryVersion = ARCH;
  out->maxDynamicSharedSizeBytes = shared_per_block_optin();
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int, size_t, unsigned) {
  *out = 4;
  return cudaSuccess;
}

API cudaError_t cudaLibraryLoadData(
    cudaLibrary_t* out, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned) {
  *out = cudaLibrary_t(8);
  return cudaSuccess;
}

API cudaError_t cudaLibraryGetKernel(cudaKernel_t* out, cudaLibrary_t, const char*) {
  *out = cudaKernel_t(8);
  return cudaSuccess;
}

API cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// The driver's functions by name: the newest version that is here.
API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** out, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *out = nullptr;
  for (const char* suffix : {"_v3", "_v2", ""}) {
    if (!*out) *out = dlsym(RTLD_DEFAULT, (std::string(symbol) + suffix).c_str());
  }
  if (result) *result = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
