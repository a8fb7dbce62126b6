// Python bindings for what is no tensor operator: how this was built, what the processor has, and
// the CUDA planner, which needs no GPU to be asked about one.
// Importing the module also registers the operators (ops_cpu.cpp). No torch header here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/generate_plan.h"
#include "cuda/planner.h"

namespace py = pybind11;

namespace {

using namespace fastlstm;

// See fastlstm/algorithms.py, which names the arguments for users.
py::dict plan(int dtype, int64_t steps, int64_t batch, bool packed, int64_t hidden_size,
              int64_t proj_size, int layers, int directions, bool backward, int capability, int sms,
              int64_t shared_per_block, int algorithm, bool allow_tf32, bool plain_cells,
              bool layer_norm) {
  static const int64_t lengths = 0;  // only whether there are any matters here
  Problem p{};
  p.dtype = DType(dtype);
  p.steps = steps;
  p.batch = batch;
  p.rows = steps * batch;
  p.batch_sizes = packed ? &lengths : nullptr;
  p.hidden_size = hidden_size;
  p.out_size = proj_size > 0 ? proj_size : hidden_size;
  p.projected = proj_size > 0;
  p.layers = layers;
  p.directions = directions;
  p.layer_norm = layer_norm;
  p.cell.clip = plain_cells ? 0 : 1;  // as any of its options would
  const cuda::Plan found =
      cuda::plan(p, backward ? cuda::Pass::backward : cuda::Pass::forward,
                 {capability, sms, shared_per_block}, {cuda::Algorithm(algorithm), allow_tf32});
  py::dict result;
  result["algorithm"] = cuda::name(found.algorithm);
  result["reason"] = found.reason;
  result["tensor_cores"] = found.tensor_cores;
  result["microseconds"] = found.microseconds;
  if (found.ctas > 0) {
    result["ctas"] = found.ctas;
    result["units"] = found.units;
    result["sequences"] = found.sequences;
  }
  return result;
}

// Of the kernel that draws text; "reason" says why it does not run, or is None.
py::dict generate_plan(int element_bytes, int64_t hidden_size, int64_t layers, int64_t vocabulary,
                       int64_t batch, int capability, int sms, int64_t shared_per_block) {
  const cuda::GeneratePlan found = cuda::generate_plan(
      {element_bytes, hidden_size, layers, vocabulary, batch}, {capability, sms, shared_per_block});
  py::dict result;
  result["reason"] = found.reason ? py::object(py::str(found.reason)) : py::none();
  result["units"] = found.layout.units;
  result["columns"] = found.layout.columns();
  result["ctas"] = found.layout.ctas;
  result["groups"] = found.groups;
  result["active"] = found.active;
  result["shared"] = found.layout.bytes;
  result["microseconds"] = found.microseconds;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlstm's native kernels for the CPU";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = FASTLSTM_COMPILER;
    info["torch_built_with"] = FASTLSTM_TORCH_VERSION;
    std::vector<std::string> sets;
    for (int j = 0; j < fastlstm::kInstructionSetCount; ++j)
      sets.push_back(fastlstm::kInstructionSets[j].name);
    info["cpu_instruction_sets"] = sets;
    return info;
  });
  m.def(
      "cpu_supported",
      [] {
        std::vector<std::string> sets;
        for (int j = 0; j < fastlstm::kInstructionSetCount; ++j)
          if (fastlstm::kInstructionSets[j].supported())
            sets.push_back(fastlstm::kInstructionSets[j].name);
        return sets;
      },
      "Instruction sets that were built and that this processor has, best first.");
  m.def("cpu_selected", [] { return std::string(fastlstm::instruction_set().name); });
  m.def(
      "cpu_select",
      [](const std::string& name) {
        if (!fastlstm::select_instruction_set(name.c_str()))
          throw py::value_error("no such instruction set on this processor: " + name);
      },
      py::arg("name"), "Use this instruction set from now on, in all threads.");
  auto multiply_adds = [&m](const char* name, DType dtype, const char* doc) {
    m.def(
        name,
        [dtype](int64_t rounds) {
          return fastlstm::instruction_set().kernels[int(dtype)]->multiply_adds(rounds);
        },
        py::arg("rounds"), py::call_guard<py::gil_scoped_release>(), doc);
  };
  multiply_adds("cpu_multiply_adds", DType::f32,
                "Run float32 multiply-adds from registers alone; returns how many operations.");
  multiply_adds("cpu_multiply_adds_bf16", DType::bf16,
                "The same with what multiplies bfloat16 on this processor.");
  m.def("plan", &plan, py::kw_only(), py::arg("dtype"), py::arg("steps"), py::arg("batch"),
        py::arg("packed"), py::arg("hidden_size"), py::arg("proj_size"), py::arg("layers"),
        py::arg("directions"), py::arg("backward"), py::arg("capability"), py::arg("sms"),
        py::arg("shared_per_block"), py::arg("algorithm"), py::arg("allow_tf32"),
        py::arg("plain_cells") = true, py::arg("layer_norm") = false,
        "What the CUDA planner picks for a problem on a device that need not be there.");
  m.def("generate_plan", &generate_plan, py::kw_only(), py::arg("element_bytes"),
        py::arg("hidden_size"), py::arg("layers"), py::arg("vocabulary"), py::arg("batch"),
        py::arg("capability"), py::arg("sms"), py::arg("shared_per_block"),
        "How one launch draws a model's text on a device that need not be there.");
}
