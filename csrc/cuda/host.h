// The device that a call runs on: made current, what it has, and torch's stream there.
#pragma once
#include "dense_block.h"

#ifdef CSP_EMULATION
#define CSP_DISPATCH_KEY CPU

namespace csp::cuda {

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t find_devices() { return cudaSuccess; }
// Few blocks, so that each has several tiles; shared memory of sm_90.
struct Current {
  explicit Current(int) {}
  Device device() const { return {3, 227 * 1024, nullptr}; }
  int capability() const { return 90; }
};

}  // namespace csp::cuda

#else
#include <dlfcn.h>
#include "../checks.h"
#define CSP_DISPATCH_KEY CUDA

namespace csp::cuda {

// From libtorch_cuda, which is there where tensors on a GPU are. The library itself links to nothing of CUDA, so that it loads with
// a torch for CPUs.
inline cudaStream_t current_stream(int index) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Get>(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  require(get && get(index, &stream) == 0, {"csp_kernels", "CUDA"}, "torch's current stream cannot be found");
  return static_cast<cudaStream_t>(stream);
}

inline cudaError_t find_devices() {
  int count = 0;
  return taken(cudaGetDeviceCount(&count));
}

class Current {
  int index, previous = 0;

  void check(cudaError_t error) const {
    if (taken(error) != cudaSuccess) refuse({"csp_kernels", "CUDA device", index}, cudaGetErrorString(error));
  }

 public:
  explicit Current(int index) : index(index) {
    check(cudaGetDevice(&previous));
    if (previous != index) check(cudaSetDevice(index));
  }
  ~Current() {
    if (previous != index) (void)taken(cudaSetDevice(previous));
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }
  Device device() const {
    return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), current_stream(index)};
  }
  int capability() const { return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor); }
};

}  // namespace csp::cuda
#endif
