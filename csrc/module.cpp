// Python bindings for what is no tensor operator: how this was built, what the processor has.
// Importing the module also registers the operators (ops_cpu.cpp). No torch header here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

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
}
