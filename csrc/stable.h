// LibTorch's stable ABI, the only door to torch: what every torch since 2.10 offers, and the one
// place that knows how those versions differ. No other file includes a header of torch's.
//
// What fails inside torch comes back as a status alone. It is thrown here as std::runtime_error
// (a RuntimeError in Python) with torch's own reason where the torch that runs hands it out: since
// 2.13, by a function that is looked for at load and not at link, for one build serves all.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastlstm {
namespace ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Torch's reason for the call that failed last on this thread; null where it does not tell.
inline const char* reason() {
  return torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                    : nullptr;
}

inline void check_call(AOTITorchError status, const char* call) {
  if (status == TORCH_SUCCESS) return;
  const char* why = reason();
  throw std::runtime_error(std::string("fastlstm: ") + call +
                           " failed: " + (why ? why : "torch printed the reason"));
}

// fastlstm/native.py reads this text and raises what torch raises. Where nothing reads it, as in
// compiled graphs, it still holds the words by which tools know that memory ran out.
// device: a GPU's number, or -1 for the CPU.
[[noreturn]] inline void throw_not_allocated(int64_t bytes, int32_t device, const char* why) {
  if (why == nullptr)
    why = device < 0 ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.";
  const std::string where = device < 0 ? "cpu" : "cuda:" + std::to_string(device);
  throw std::runtime_error("fastlstm: cannot allocate " + std::to_string(bytes) + " bytes on " +
                           where + ": " + why);
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

// Uninitialised, on the device of `like`; the strides leave no gaps.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const ScalarType type = dtype ? *dtype : like.scalar_type();
  int32_t device_type = 0;
  check_call(aoti_torch_get_device_type(like.get(), &device_type), "the device's type");
  const int32_t index = like.is_cpu() ? -1 : int32_t(like.get_device_index());
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               to<int32_t>(from(type)), device_type, index,
                               &handle) != TORCH_SUCCESS) {
    int64_t bytes = element_size(type);
    for (const int64_t size : sizes) bytes *= size;
    throw_not_allocated(bytes, index, reason());
  }
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d])
    strides[d] = elements > 0 ? elements : 1;
  return empty_strided(sizes, strides, like, dtype);
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()));
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = x.size(int64_t(d));
  return sizes;
}

// Asks first: torch's own goes through the dispatcher, microseconds for every tensor of a call.
inline Tensor as_contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor copy = empty(sizes_of(x), x);
  torch::stable::copy_(copy, x);
  return copy;
}
inline MaybeTensor maybe_contiguous(const MaybeTensor& x) {
  return x ? MaybeTensor(as_contiguous(*x)) : std::nullopt;
}

}  // namespace ops
}  // namespace fastlstm
