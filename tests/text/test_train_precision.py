"""``--precision auto``: what it chooses on which device, and that a run keeps its choice."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")


from trainer import train

from fastlstm.ops import native
from fastlstm.text.model import CELLS
from fastlstm.text.training import options, precision

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def on_cpu_with(monkeypatch, name):
    monkeypatch.setattr(native._C, "cpu_selected", lambda: name)


def tiny(run, text, *arguments):
    train("--data", text, "--out", run, "--hidden-size", 16, "--batch-size", 4, "--seq-length", 8,
          "--sample-every", 0, "--device", "cpu", *arguments)  # fmt: skip
    return kept(run)


def kept(run):
    return json.loads((run / "config.json").read_text())["precision"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("baseline", "fp32"), ("avx2", "fp32"), ("avx512", "fp32"), ("avx512_bf16", "bf16"),
     ("amx", "bf16")],
)  # fmt: skip
def test_a_cpu_takes_bf16_where_it_multiplies_it(monkeypatch, name, expected):
    on_cpu_with(monkeypatch, name)
    assert precision.choose("lstm", CPU) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "tf32"), ((8, 0), "bf16"), ((10, 0), "bf16")]
)
def test_a_gpu_takes_bf16_where_our_kernels_multiply_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "missing_on_gpu", lambda device: None)
    assert precision.choose("lstm", GPU) == expected
    monkeypatch.setattr(native, "missing_on_gpu", lambda device: "the kernels were not built")
    assert precision.choose("lstm", GPU) == "tf32"


def test_torchs_own_cells_stay_near_float32(monkeypatch):
    on_cpu_with(monkeypatch, "amx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "missing_on_gpu", lambda device: None)
    for cell in sorted({*CELLS} - {"lstm"}):
        assert precision.choose(cell, CPU) == "fp32"
        assert precision.choose(cell, GPU) == "tf32"


def test_every_choice_is_one_that_the_trainer_takes():
    assert options.Config().precision == "auto"
    known = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    assert all(f'{{"{name}",' in known for name in precision.BF16_SETS)
    assert {"bf16", "tf32", "fp32"} <= set(options.OPTIONS["precision"].choices)


@pytest.mark.parametrize(("name", "expected"), [("avx2", "fp32"), ("amx", "bf16")])
def test_the_choice_is_said_and_kept(tmp_path, text, capsys, monkeypatch, name, expected):
    """A run that goes on elsewhere goes on with it, whether auto is asked for again or not."""
    on_cpu_with(monkeypatch, name)
    run = tmp_path / "run"
    assert tiny(run, text, "--steps", 3) == expected
    assert f"parameters, {expected} on cpu\n" in capsys.readouterr().out
    on_cpu_with(monkeypatch, "amx" if expected == "fp32" else "avx2")
    train("--out", run, "--resume", "--steps", 5)
    assert kept(run) == expected
    train("--out", run, "--resume", "--steps", 7, "--precision", "auto")
    assert kept(run) == expected
    assert f"parameters, {expected} on cpu\n" in capsys.readouterr().out


def test_a_choice_made_by_hand_is_kept_too(tmp_path, text, capsys, monkeypatch):
    on_cpu_with(monkeypatch, "amx")
    run = tmp_path / "run"
    assert tiny(run, text, "--steps", 3, "--precision", "fp32") == "fp32"
    train("--out", run, "--resume", "--steps", 5, "--precision", "auto")
    assert kept(run) == "fp32"
    with pytest.raises(SystemExit) as error:
        train("--out", run, "--resume", "--steps", 7, "--precision", "bf16")
    assert error.value.code == 2
    assert "--precision bf16 disagrees with the run to resume" in capsys.readouterr().err


def test_another_runs_cell_decides(tmp_path, text, monkeypatch):
    on_cpu_with(monkeypatch, "amx")
    assert tiny(tmp_path / "gru", text, "--steps", 2, "--cell", "gru") == "fp32"
    assert tiny(tmp_path / "more", text, "--steps", 2, "--init-from", tmp_path / "gru") == "fp32"
