// What the planner needs to know of a GPU, read once for each GPU.
#include <map>
#include <mutex>
#include <vector>

#include "launch.h"
#include "shared/device.cuh"

namespace fastlstm {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device properties");
  return value;
}

// Compiled as all kernels are.
__global__ void any_kernel() {}

}  // namespace

// The code must wait, too: that for older GPUs, compiled by the driver for this one, does not.
bool kernels_begin_early() {
  static std::mutex mutex;
  static std::map<int, bool> known;  // by device
  int index = 0;
  check(cudaGetDevice(&index), "the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, any_kernel), "a kernel's attributes");
  const int capability = attribute(cudaDevAttrComputeCapabilityMajor, index);
  return known[index] = capability >= 9 && code.ptxVersion >= 90;
}

Device device_properties(int index) {
  static std::mutex mutex;
  static std::vector<Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= int(devices.size())) devices.resize(index + 1);
  Device& device = devices[index];
  if (device.sms == 0) {
    device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                        attribute(cudaDevAttrComputeCapabilityMinor, index);
    device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    device.sms = attribute(cudaDevAttrMultiProcessorCount, index);
  }
  return device;
}

}  // namespace cuda
}  // namespace fastlstm
