"""An ``nn.LSTM`` as an ONNX graph, for ONNX Runtime as a peer in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def runner(lstm: nn.LSTM, threads: int) -> Callable[[Tensor], Tensor]:
    """A function from (T, B, I) to the output."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        graph(lstm, onnx).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return run


def graph(lstm: nn.LSTM, onnx: Any) -> Any:
    """One LSTM node a layer. ONNX orders the gates i, o, f, g and gives (T, D, B, H)."""
    helper, directions = onnx.helper, 1 + lstm.bidirectional
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(onnx.numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def gates(name: str) -> Tensor:
        i, f, g, o = lstm.get_parameter(name).chunk(4)
        return torch.cat((i, o, f, g))

    x = "x"
    for layer in range(lstm.num_layers):
        ends = [f"l{layer}{reverse}" for reverse in ("", "_reverse")[:directions]]
        w = constant(f"w{layer}", torch.stack([gates(f"weight_ih_{end}") for end in ends]))
        r = constant(f"r{layer}", torch.stack([gates(f"weight_hh_{end}") for end in ends]))
        biases = [torch.cat((gates(f"bias_ih_{e}"), gates(f"bias_hh_{e}"))) for e in ends]
        b = constant(f"b{layer}", torch.stack(biases))
        direction = "bidirectional" if directions == 2 else "forward"
        nodes += [
            helper.make_node(
                "LSTM", [x, w, r, b], [f"y{layer}"], hidden_size=lstm.hidden_size,
                direction=direction,
            ),
            helper.make_node("Transpose", [f"y{layer}"], [f"z{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"z{layer}", "shape"], [f"x{layer + 1}"]),
        ]  # fmt: skip
        x = f"x{layer + 1}"
    constant("shape", torch.tensor([0, 0, -1]))
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "lstm",
            [value("x", onnx.TensorProto.FLOAT, ["T", "B", lstm.input_size])],
            [value(x, onnx.TensorProto.FLOAT, None)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
