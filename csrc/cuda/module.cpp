// Python bindings of fastlstm._C_cuda: importing it registers the CUDA side of the operators
// (ops_cuda.cpp). No torch header here.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace {

pybind11::tuple gpu_sizes() {
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess)
    throw std::runtime_error(std::string("fastlstm: the current device: ") +
                             cudaGetErrorString(error));
  const fastlstm::cuda::Device device = fastlstm::cuda::device_properties(index);
  return pybind11::make_tuple(device.capability, device.sms, device.shared_per_block,
                              device.largest_cluster);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fastlstm's CUDA kernels";
  m.def("gpu_sizes", &gpu_sizes,
        "Of the current GPU what the planner reads: compute capability, or that of its code where "
        "it is older; multiprocessors; bytes of shared memory that a block may ask for; the CTAs "
        "of the largest cluster.");
  m.attr("architectures") = FASTLSTM_CUDA_TARGETS;
  m.attr("toolkit") = CUDART_VERSION;
}
