// ---------------------------------------------------------------------------------------------------------------
// Runtime: devices. All are alike.

static const int SHARED_PER_BLOCK = 49152;

static int shared_per_block_optin() {
  if (ARCH == 75) return 65536;
  if (ARCH == 86 || ARCH == 89 || ARCH >= 120) return 101376;
  return ARCH == 80 ? 166912 : 232448;
}

static int shared_per_multiprocessor() {
  return ARCH == 75 ? 65536 : shared_per_block_optin() + 1024;
}

static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_PER_BLOCK;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrClockRate: return 1700000;
    case cudaDevAttrMultiProcessorCount: return SMS;
    case cudaDevAttrMemoryClockRate: return 2600000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrComputeCapabilityMajor: return ARCH / 10;
    case cudaDevAttrComputeCapabilityMinor: return ARCH % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return shared_per_multiprocessor();
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_per_block_optin();
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    default: return 0;
  }
}

API cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr which, int) {
  *out = attribute(which);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "Fake");
  out->totalGlobalMem = total;
  out->sharedMemPerBlock = SHARED_PER_BLOCK;
  out->regsPerBlock = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->major = ARCH / 10;
  out->minor = ARCH % 10;
  out->multiProcessorCount = SMS;
  out->l2CacheSize = 50 << 20;
  out->maxThreadsPerMultiProcessor = 2048;
  out->sharedMemPerMultiprocessor = shared_per_multiprocessor();
  out->sharedMemPerBlockOptin = shared_per_block_optin();
  out->maxBlocksPerMultiProcessor = 32;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceCount(int* out) {
  *out = DEVICES;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= DEVICES) return fail(cudaErrorInvalidDevice);
  device = index;
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* out) {
  *out = DRIVER_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* out, int, int) {
  *out = 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

API cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int index) {
  snprintf(out, size, "0000:%02x:00.0", index + 1);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  BEGIN(N_synchronize);
  counts[N_device_synchronize]++;
  if (forbidden("cudaDeviceSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
  wait_for_all();
  return cudaSuccess;
}

API cudaError_t cudaGetLastError() {
  int error = std::exchange(last_error, int(cudaSuccess));
  return cudaError_t(gone ? int(gone) : error);
}

API cudaError_t cudaPeekAtLastError() {
  return cudaError_t(gone ? int(gone) : last_error);
}

API const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[32];
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorUnknown: return "unknown error";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: snprintf(text, sizeof text, "fake CUDA error %d", int(error)); return text;
  }
}

API const char* cudaGetErrorName(cudaError_t error) {
  return cudaGetErrorString(error);
}
