// ---------------------------------------------------------------------------------------------------------------
// cuBLAS: a handle, a stream, and one algorithm for everything. Products are launches, here and in the stubs.
// Ignored: workspaces that cuBLAS would allocate itself; torch gives it one from its own allocator.

static void* const HANDLE = reinterpret_cast<void*>(64);
static thread_local cudaStream_t blas_stream;

API int cublasCreate_v2(void** out) {
  *out = HANDLE;
  return 0;
}

API int cublasGetMathMode(void*, int* out) {
  *out = 0;
  return 0;
}

API int cublasGetPointerMode_v2(void*, int* out) {
  *out = 0;
  return 0;
}

API int cublasSetStream_v2(void*, cudaStream_t handle) {
  blas_stream = handle;
  return 0;
}

// what the stubs of cuBLAS call
API int fake_product(const char* name, cudaStream_t handle) {
  if (begin(N_blas)) return 13;  // CUBLAS_STATUS_EXECUTION_FAILED
  return fast ? 0 : launch(name, handle) ? 13 : 0;
}

API int fake_blas(const char* name) {
  return fake_product(name, blas_stream);
}

API int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t handle) {
  return fake_product("cublasLtMatmul", handle);
}

API size_t cublasLtGetVersion() { return 130100; }

API int cublasLtMatmulDescCreate(void** out, int, int) {
  *out = HANDLE;
  return 0;
}

API int cublasLtMatrixLayoutCreate(void** out, int, uint64_t, uint64_t, int64_t) {
  *out = HANDLE;
  return 0;
}

API int cublasLtMatmulPreferenceCreate(void** out) {
  *out = HANDLE;
  return 0;
}

API int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  const size_t result_size = 96;  // of cublasLtMatmulHeuristicResult_t
  memset(results, 0, result_size);
  *found = 1;
  return 0;
}
