// Python bindings of what is not a tensor operator: how this module was built, the processor's
// instruction sets, and the CUDA planner, which plans for any GPU without having one.
// Importing the module also registers the operators (ops_cpu.cpp). No torch header is included
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/cost_model.h"
#include "cpu/kernels.h"
#include "cuda/generate_plan.h"
#include "cuda/planner.h"
#include "ops_packed.h"

namespace py = pybind11;

namespace {

using namespace fastlstm;

// See fastlstm/algorithms.py, which names the arguments for users.
py::dict plan(int dtype, int64_t steps, int64_t batch, bool packed, int64_t hidden_size,
              int64_t proj_size, int layers, int directions, bool backward, int capability, int sms,
              int64_t shared_per_block, int algorithm, bool allow_tf32, bool plain_cells,
              bool layer_norm, int largest_cluster) {
  static const int64_t lengths = 0;  // the planner asks only whether there are any
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
  p.cell.clip = plain_cells ? 0 : 1;  // stands for any option of the cell
  const cuda::Plan chosen = cuda::plan(p, backward ? cuda::Pass::backward : cuda::Pass::forward,
                                       {capability, sms, shared_per_block, largest_cluster},
                                       {cuda::Algorithm(algorithm), allow_tf32});
  py::dict result;
  result["algorithm"] = cuda::name(chosen.algorithm);
  result["reason"] = chosen.reason;
  result["tensor_cores"] = chosen.tensor_cores;
  result["microseconds"] = chosen.microseconds;
  if (chosen.ctas > 0) {
    result["ctas"] = chosen.ctas;
    result["units"] = chosen.units;
    result["sequences"] = chosen.sequences;
    result["chunk_steps"] = chosen.chunk_steps;
  }
  return result;
}

// The plan of the kernel that draws text. "reason" says why it does not run, or is None.
py::dict generate_plan(int element_bytes, int64_t hidden_size, int64_t layers, int64_t vocabulary,
                       int64_t batch, int capability, int sms, int64_t shared_per_block) {
  const cuda::GeneratePlan chosen = cuda::generate_plan(
      {element_bytes, hidden_size, layers, vocabulary, batch}, {capability, sms, shared_per_block});
  py::dict result;
  result["reason"] = chosen.reason ? py::object(py::str(chosen.reason)) : py::none();
  result["units"] = chosen.layout.units;
  result["columns"] = chosen.layout.columns();
  result["ctas"] = chosen.layout.ctas;
  result["groups"] = chosen.groups;
  result["active"] = chosen.active;
  result["shared"] = chosen.layout.bytes;
  result["microseconds"] = chosen.microseconds;
  return result;
}

// How the CPU kernels divide one layer of a stack. "costs" names those of the kernels'
// instructions.
py::dict cpu_division(const std::string& costs, int64_t weight_bytes, int64_t input_size,
                      int64_t hidden_size, int64_t steps, int64_t batch, int directions,
                      int64_t threads) {
  Problem p{};
  p.steps = steps;
  p.batch = batch;
  p.rows = steps * batch;
  p.hidden_size = p.out_size = hidden_size;
  p.input_size = input_size;
  p.layers = 1;
  p.directions = directions;
  const Costs* known = costs == "tiles"    ? &kTileCosts
                       : costs == "avx512" ? &kAvx512Costs
                       : costs == "narrow" ? &kNarrowCosts
                                           : nullptr;
  if (known == nullptr)
    throw py::value_error("costs: expected tiles, avx512 or narrow, got " + costs);
  const int64_t work = directions * p.rows * 4 * hidden_size * (hidden_size + input_size);
  const int64_t gates = 4 * hidden_size;
  py::dict result;
  if (runs_direct(p)) {  // ForwardTask::run_direct
    const int64_t weights = gates * (hidden_size + input_size);
    const EvenTeam team(*known, worthwhile_threads(threads, weights * batch), weights, batch,
                        weight_bytes, 1);
    result["parts"] = 1;
    result["members"] = team.members;
    result["threads"] = team.members;
    const int64_t cells = ceil_div(p.rows * hidden_size, team.members);
    result["multiply_adds"] = directions * (steps * team.step + cells * known->cell);
  } else {
    const Division division(p, *known, threads, work, weight_bytes);
    result["parts"] = division.parts;
    result["members"] = division.members;
    result["threads"] = division.threads;
    result["multiply_adds"] =
        steps * (division.step + division.thread_gates * (input_size + known->cell / 4));
  }
  // A library that runs one direction after the other, and divides every product evenly.
  const int64_t weights = gates * hidden_size;
  const EvenTeam even(*known, worthwhile_threads(threads, weights * batch), weights, batch,
                      weight_bytes, 1);
  const int64_t input_part = product_cost(*known, ceil_div(gates * input_size, threads),
                                          gates * input_size, p.rows, weight_bytes, threads);
  const int64_t cells = ceil_div(p.rows * hidden_size, threads) * known->cell;
  result["even_multiply_adds"] = directions * (steps * even.step + input_part + cells);
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
  m.def("free_packed", &fastlstm::free_packed, py::arg("handle"));
  m.def(
      "kept_scratch",
      [] { return py::make_tuple(fastlstm::kept_by_thread(), fastlstm::kept_by_process()); },
      "The bytes that are kept for the next calls: by this thread, and by the process.");
  m.def("free_kept", &fastlstm::free_kept);
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
        py::arg("largest_cluster") = fastlstm::cuda::Device{}.largest_cluster,
        "What the CUDA planner picks for a problem on a device that need not be there.");
  m.def("generate_plan", &generate_plan, py::kw_only(), py::arg("element_bytes"),
        py::arg("hidden_size"), py::arg("layers"), py::arg("vocabulary"), py::arg("batch"),
        py::arg("capability"), py::arg("sms"), py::arg("shared_per_block"),
        "How one launch draws a model's text on a device that need not be there.");
  m.def("cpu_division", &cpu_division, py::kw_only(), py::arg("costs"), py::arg("weight_bytes"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("steps"), py::arg("batch"),
        py::arg("directions"), py::arg("threads"),
        "How the CPU kernels divide a layer's forward pass among threads that need not be there.");
}
