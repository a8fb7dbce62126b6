// A CUDA runtime that knows no GPU but those that the arguments describe, for
// test_gpu_properties.py. Prints what device_properties.cu makes of it.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "shared/patience.h"

namespace fastlstm {
namespace cuda {
bool kernels_begin_early();
void allow_shared(const void* kernel, size_t bytes);
}  // namespace cuda
}  // namespace fastlstm

namespace {
int current, major_capability, minor_capability, code_architecture, driver_version, largest;
}

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = major_capability; break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor_capability; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = code_architecture;
  attributes->binaryVersion = 10 * major_capability + minor_capability;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && largest == 0)
    std::printf("%d %s %d\n", current, static_cast<const char*>(kernel), value);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                           const cudaLaunchConfig_t* config) {
  *count = config->gridDim.x <= unsigned(largest) ? 7 : 0;
  return config->gridDim.x <= 8 || largest > 8 ? cudaSuccess : cudaErrorInvalidClusterSize;
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// What nvcc's code for the host calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 0; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorInvalidValue; }
}

// gpu MAJOR MINOR CODE DRIVER LARGEST: of a GPU of this compute capability, with code that was
//   compiled for an architecture, a driver and its largest cluster, what the planner is told, and
//   whether kernels begin early.
// shared (DEVICE KERNEL BYTES)...: which launches change what a kernel may take.
// wait: for how long a CTA waits for another, in nanoseconds.
int main(int count, char** arguments) {
  using namespace fastlstm::cuda;
  if (std::strcmp(arguments[1], "gpu") == 0) {
    major_capability = std::atoi(arguments[2]);
    minor_capability = std::atoi(arguments[3]);
    code_architecture = std::atoi(arguments[4]);
    driver_version = std::atoi(arguments[5]);
    largest = std::atoi(arguments[6]);
    const Device device = device_properties(0);
    std::printf("%d %lld %d %d\n", device.capability,
                static_cast<long long>(device.shared_per_block), int(kernels_begin_early()),
                device.largest_cluster);
  }
  if (std::strcmp(arguments[1], "wait") == 0)
    std::printf("%llu\n", static_cast<unsigned long long>(wait_limit()));
  static const char kernels[2][2] = {"a", "b"};
  for (int j = 2; j + 2 < count && std::strcmp(arguments[1], "shared") == 0; j += 3) {
    current = std::atoi(arguments[j]);
    allow_shared(kernels[arguments[j + 1][0] - 'a'], size_t(std::atoi(arguments[j + 2])));
  }
}
