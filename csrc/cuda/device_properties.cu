// What the planner needs to know of a GPU, read once for each GPU.
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

}  // namespace

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
