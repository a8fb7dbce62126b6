// What the planner wants to know of a device, asked once a device.
#include <mutex>
#include <vector>

#include "device.cuh"
#include "launch.h"

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
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= int(known.size())) known.resize(index + 1);
  Device& device = known[index];
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
