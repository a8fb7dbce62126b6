// What the planner needs to know of a GPU, read once for each GPU; and what launches ask of it.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "launch.h"
#include "shared/exchange.cuh"
#include "stepwise/tiles.h"

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

int largest_cluster(int64_t shared) {
  const void* kernel = reinterpret_cast<const void*>(any_kernel);
  for (unsigned ctas : {16, 8, 4, 2})
    if (clusters_at_once(kernel, ctas, 32, size_t(shared)) > 0) return int(ctas);
  return 1;
}

}  // namespace

// The permission is the kernel's, of all threads: one that launches with less must not take back
// what another is about to use.
void allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kWithout = 48 << 10;
  if (bytes <= kWithout) return;
  static std::mutex mutex;
  // By device and kernel. Never destroyed: threads may launch while the process ends.
  static auto& allowed = *new std::map<std::pair<int, const void*>, size_t>;
  int index = 0;
  check(cudaGetDevice(&index), "the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{index, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "shared memory");
  most = bytes;
}

int clusters_at_once(const void* kernel, unsigned cluster, unsigned threads, size_t shared) {
  allow_shared(kernel, shared);
  if (cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess ? count : 0;
}

// A CUDA graph records such a launch only with drivers of CUDA 12.3 and newer.
bool kernels_begin_early() {
  static const int driver = [] {
    int version = 0;
    check(cudaDriverGetVersion(&version), "the driver's version");
    return version;
  }();
  int index = 0;
  check(cudaGetDevice(&index), "the current device");
  return driver >= 12030 && device_properties(index).capability >= 90;
}

Device device_properties(int index) {
  static std::mutex mutex;
  static auto& devices = *new std::vector<Device>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= int(devices.size())) devices.resize(index + 1);
  Device& device = devices[index];
  if (device.sms == 0) {
    // Where no image is for this GPU, the driver compiles PTX for an older one. What came later is
    // left out of that code: kernels that need it do nothing.
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, any_kernel), "a kernel's attributes");
    const int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                           attribute(cudaDevAttrComputeCapabilityMinor, index);
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    device.capability = std::min(capability, code.ptxVersion);
    device.shared_per_block = code.ptxVersion < 80 ? std::min(shared, kOldSharedBytes) : shared;
    if (device.capability >= 90) device.largest_cluster = largest_cluster(shared);
    device.sms = attribute(cudaDevAttrMultiProcessorCount, index);
  }
  return device;
}

}  // namespace cuda
}  // namespace fastlstm
