"""Leaving Python: AOTInductor with our operators, ONNX and TorchScript through ``to_torch``."""

import pytest
import torch
from torch import nn

import fastlstm


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fastlstm.LSTM(3, 5, 2, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(tmp_path):
    model, x = Tagger().eval(), torch.randn(6, 2, 3)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "tagger.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx_through_to_torch(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Tagger().eval(), torch.randn(6, 2, 3)
    plain = fastlstm.to_torch(model)
    path = str(tmp_path / "tagger.onnx")
    torch.onnx.export(
        plain, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "T", 1: "B"}}
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((6, 2, 3), (9, 3, 3)):
        x = torch.randn(shape)
        found = session.run(None, {"x": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_through_to_torch(tmp_path):
    model, x = Tagger().eval(), torch.randn(6, 2, 3)
    torch.jit.script(fastlstm.to_torch(model)).save(str(tmp_path / "tagger.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "tagger.pt"))(x), model(x))
