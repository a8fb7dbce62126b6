// LibTorch's stable ABI, the only door to torch: what every torch since 2.10 offers, and the one
// place that knows how those versions differ. No other file includes a header of torch's.
//
// What fails inside torch comes back as a status alone. It is thrown here as std::runtime_error
// (a RuntimeError in Python) with torch's own reason where the torch that runs hands it out: since
// 2.13, by a function that is looked for at load and not at link, for one build serves all. So is
// the one that makes a tensor of memory that is not torch's.
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

#include "scratch.h"

extern "C" {
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // since 2.13
__attribute__((weak)) AOTITorchError torch_from_blob(                            // since 2.11
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* tensor,
    int32_t layout, const uint8_t* metadata, int64_t metadata_size,
    void (*deleter)(void* data, void* context), void* context);
}

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

// fastlstm/ops/native.py reads this text and raises what torch raises. Where nothing reads it, as
// in compiled graphs, it still holds the words by which tools know that memory ran out.
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

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d])
    strides[d] = elements > 0 ? elements : 1;
  return strides;
}

inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return empty_strided(sizes, contiguous_strides(sizes), like, dtype);
}

// The same, on a CPU in memory of scratch.h where it is large enough for that to pay. For what the
// next call needs again: what forward keeps until backward, and gradients. Torch asks the system
// for such memory in every call, and so do we beside torch 2.10.
inline Tensor empty_reused(const std::vector<int64_t>& sizes, const Tensor& like,
                           std::optional<ScalarType> dtype = std::nullopt) {
  constexpr int64_t kLeast = 256 << 10;
  const ScalarType type = dtype ? *dtype : like.scalar_type();
  int64_t bytes = element_size(type);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kLeast || !like.is_cpu() || torch_from_blob == nullptr)
    return empty(sizes, like, type);
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  void* data = take_scratch(bytes);
  if (data == nullptr) throw_not_allocated(bytes, -1, nullptr);
  auto give = [](void* block, void*) { give_scratch(block); };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      torch_from_blob(data, int64_t(sizes.size()), sizes.data(), contiguous_strides(sizes).data(),
                      0, to<int32_t>(from(type)), aoti_torch_device_type_cpu(), -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, give, nullptr);
  if (status != TORCH_SUCCESS) give_scratch(data);
  check_call(status, "a tensor of memory that was kept");
  return Tensor(handle);
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
