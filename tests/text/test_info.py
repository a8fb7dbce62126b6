"""``python -m fastlstm.info``: what a bug report needs, and what runs on each device."""

import json
from types import SimpleNamespace

import pytest
import torch

from fastlstm import _C, info
from fastlstm.ops import native


def test_the_cpu_part(capsys):
    info.main([])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert f"used   {_C.cpu_selected()} " in text
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts == info.info()
    assert facts["cpu"]["instruction_sets_usable"] == _C.cpu_supported()


def test_gpus_are_named_with_what_runs_on_them(capsys, monkeypatch):
    capabilities = [(8, 0), (7, 0)]
    monkeypatch.setattr(native, "_C_cuda", SimpleNamespace(architectures="8.0;9.0a"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["A100", "V100"].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    native._missing_on_gpu.cache_clear()
    info.main([])
    native._missing_on_gpu.cache_clear()
    text = capsys.readouterr().out
    assert "devices: A100, V100\n  built  8.0;9.0a\n  used   A100: the CUDA kernels\n" in text
    assert "V100: torch's own LSTM, for the CUDA kernels were built for 8.0;9.0a, not for" in text


@pytest.mark.parametrize("devices", [0, 1])
def test_without_kernels(devices, capsys, monkeypatch):
    monkeypatch.setattr(native, "_C_cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    native._missing_on_gpu.cache_clear()
    info.main([])
    native._missing_on_gpu.cache_clear()
    text = capsys.readouterr().out
    assert "  built  no kernels\n" in text
    if devices:
        assert "A100: torch's own LSTM, for the CUDA kernels were not built" in text
    else:
        assert "nothing: no device" in text
