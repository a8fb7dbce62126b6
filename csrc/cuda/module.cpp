// Python bindings of fastlstm._C_cuda: importing it registers the CUDA side of the operators
// (ops_cuda.cpp). No torch header here.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fastlstm's CUDA kernels";
  m.attr("architectures") = FASTLSTM_CUDA_TARGETS;
  m.attr("toolkit") = CUDART_VERSION;
}
