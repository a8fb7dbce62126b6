"""What the suite times is what it says: the same function, recorded samples, memory of one call."""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("pytest_benchmark")
pytest.importorskip("safetensors")

from benchmarks import backends, machine
from benchmarks.backends import BACKENDS, Backend, prepared
from benchmarks.cases import Case
from benchmarks.suite import CLOCK, recorded
from benchmarks.tables import TITLES
from fastlstm import _C

CASE = Case("small", 3, 5, 2, 4, 6)


def test_backends_have_titles():
    assert list(TITLES) == list(BACKENDS)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True])
def test_backends_agree_before_they_are_timed(kind, training):
    found = prepared(CASE, kind, training, "cpu")
    assert not found.wrong
    assert set(found.calls) >= {"fastlstm", "torch", "compiled"}
    for name, call in found.calls.items():
        call()
        if training:
            assert all(p.grad is not None for p in found.modules[name].parameters())


def doubled(theirs, ours):
    return lambda x: (2 * theirs(x)[0], None)


def raising(theirs, ours):
    raise NotImplementedError("no such cell\nand more")


def test_a_backend_that_is_wrong_raises_or_is_missing_is_not_timed(monkeypatch):
    extra = {
        "wrong": Backend(doubled),
        "raises": Backend(raising),
        "missing": Backend(doubled, ("no_such_package",)),
        "elsewhere": Backend(doubled, devices=("cuda",)),
    }
    monkeypatch.setattr(backends, "BACKENDS", BACKENDS | extra)
    found = prepared(CASE, "fp32", False, "cpu", ["fastlstm", *extra])
    assert set(found.calls) == {"fastlstm"}
    assert found.absent == {
        "raises": "raises failed: NotImplementedError: no such cell",
        "missing": "no_such_package: not installed",
    }
    assert set(found.wrong) == {"wrong"}
    assert "wrong is 1 of the norm from float64" in found.wrong["wrong"]


def test_nn_lstm_is_timed_even_where_it_is_wrong(monkeypatch):
    monkeypatch.setitem(BACKENDS, "torch", Backend(doubled))
    found = prepared(CASE, "fp32", False, "cpu")
    assert {"fastlstm", "torch"} <= set(found.calls)
    assert set(found.wrong) == {"torch"}


@pytest.mark.parametrize("build", [doubled, raising])
def test_ours_may_neither_be_wrong_nor_raise(build, monkeypatch):
    monkeypatch.setitem(BACKENDS, "fastlstm", Backend(build))
    with pytest.raises((AssertionError, NotImplementedError)):
        prepared(CASE, "fp32", False, "cpu")


def test_what_a_backend_lacks_is_not_asked_of_it():
    both, drops = Case("", 3, 5, 1, 2, 3, bidirectional=True), Case("", 3, 5, 2, 2, 3, dropout=0.5)
    onnx, haste = BACKENDS["onnxruntime"], BACKENDS["haste"]
    assert onnx.runs(both, "fp32", False, "cpu")
    assert not onnx.runs(CASE, "bf16", False, "cpu")
    assert not onnx.runs(CASE, "fp32", True, "cpu")
    prepacked = BACKENDS["prepacked"]
    assert prepacked.runs(both, "bf16", False, "cpu")
    assert not prepacked.runs(CASE, "fp32", True, "cpu")
    assert not prepacked.runs(CASE, "fp32", False, "cuda")
    assert haste.runs(CASE, "fp32", True, "cuda")
    assert not haste.runs(CASE, "fp32", True, "cpu")
    assert not haste.runs(both, "fp32", True, "cuda")
    assert not haste.runs(drops, "fp32", True, "cuda")


# ---- peers that need a GPU, played by modules that take what theirs take ----


def cell(gates, c):
    i, f, g, o = gates
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def flashrnn(wx, r, b, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):
    """wx (B, T, gates, heads, D); r (gates, heads, D, previous D): states (2, B, T, heads, D)."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    h = c = torch.zeros_like(wx[:, 0, 0])
    found = []
    for t in range(wx.shape[1]):
        h, c = cell((wx[:, t] + torch.einsum("bnp,gndp->bgnd", h, r) + b).unbind(1), c)
        found.append(torch.stack((h, c)))
    states = torch.stack(found, 2)
    return states, states[:, :, -1:]


class HasteLSTM(nn.Module):
    """Weights transposed, the gates in the order i, g, f, o."""

    def __init__(self, input_size, hidden_size):
        super().__init__()

    def from_native_weights(self, weight_ih, weight_hh, bias_ih, bias_hh):
        def reordered(w):
            i, f, g, o = w.chunk(4)
            return nn.Parameter(torch.cat((i, g, f, o)).t())

        self.kernel, self.recurrent = reordered(weight_ih), reordered(weight_hh)
        self.bias = reordered(bias_ih + bias_hh)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], self.recurrent.shape[0])
        found = []
        for row in x @ self.kernel + self.bias:
            i, g, f, o = (row + h @ self.recurrent).chunk(4, 1)
            h, c = cell((i, f, g, o), c)
            found.append(h)
        return torch.stack(found), (h[None], c[None])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("flashrnn", {"flashrnn": flashrnn}), ("haste_pytorch", {"LSTM": HasteLSTM})],
)
def test_peers_on_a_gpu_get_the_same_weights(name, content, training, monkeypatch):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    backend = name.split("_")[0]
    real = BACKENDS[backend]
    here = Backend(real.build, real.packages, kinds=("fp32",), plain=True)
    monkeypatch.setitem(BACKENDS, backend, here)
    found = prepared(CASE, "fp32", training, "cpu", ["fastlstm", backend])
    assert not found.absent
    assert not found.wrong
    found.calls[backend]()
    if training:
        parameters = list(found.modules[backend].parameters())
        assert len(parameters) == 3 * CASE.num_layers
        assert all(p.grad.abs().sum() > 0 for p in parameters)
    assert here.version() == "unknown"


# ---- the clock, the ceilings, memory ----


def test_the_timer_moves_by_recorded_samples_alone():
    CLOCK.play([0.25, 4.0])
    assert recorded() == recorded() == 0.0
    CLOCK.tick()
    assert recorded() == 0.25
    CLOCK.tick()
    assert recorded() == 4.25
    with pytest.raises(StopIteration):
        CLOCK.tick()


def test_ceilings_are_the_highest_rates_seen(monkeypatch):
    found = {}
    monkeypatch.setattr(machine, "CEILINGS", found)
    monkeypatch.setattr(machine, "copy_rate", lambda: 1.0)
    machine.measure_ceilings()
    assert found["multiply_adds"] > 1e9
    assert ("multiply_adds_bf16" in found) is (
        hasattr(_C, "cpu_multiply_adds_bf16") and machine.ceiling("bf16") != "multiply_adds"
    )
    found["multiply_adds"] = 1e30
    machine.measure_ceilings()
    assert found["multiply_adds"] == 1e30


def test_bf16_has_its_own_ceiling_where_the_processor_multiplies_it(monkeypatch):
    for selected, expected in {
        "avx2": "multiply_adds", "avx512": "multiply_adds", "avx512_bf16": "multiply_adds_bf16",
        "amx": "multiply_adds_bf16",
    }.items():  # fmt: skip
        monkeypatch.setattr(machine, "_C", types.SimpleNamespace(cpu_selected=lambda s=selected: s))
        assert machine.ceiling("bf16") == expected
        assert machine.ceiling("fp32") == "multiply_adds"


def test_peak_memory_is_what_one_call_needs():
    megabytes = 64

    def call():
        torch.ones(megabytes << 18)

    call()
    found = machine.peak_memory(call, "cpu")
    if found is None:
        pytest.skip("the system does not tell")
    assert 0.9 * (megabytes << 20) < found < 1.3 * (megabytes << 20)
