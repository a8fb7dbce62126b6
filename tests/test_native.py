"""The build: error bounds of the activations, and no instruction set leaks into another."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlstm import _C


def everywhere(dtype):
    """Both signs, every magnitude from subnormal to huge, and densely where the functions bend."""
    powers = torch.logspace(-45, 38, 20001, dtype=torch.float64)
    near = torch.linspace(0, 30, 200001, dtype=torch.float64)
    x = torch.cat((powers, near)).to(dtype)
    return torch.cat((x, -x))


@pytest.mark.parametrize(
    ("dtype", "sigmoid_bound", "tanh_bound"),
    [(torch.float32, 2e-7, 3e-7), (torch.float64, 4e-16, 1e-15)],
)
def test_activations_keep_their_error_bound(dtype, sigmoid_bound, tanh_bound, instruction_set):
    x = everywhere(dtype)
    sigmoid, tanh = (y.double() for y in torch.ops.fastlstm._activations(x))
    exact = x.double()
    assert (sigmoid - torch.sigmoid(exact)).abs().max() < sigmoid_bound
    true_tanh = torch.tanh(exact)
    normal = true_tanh.abs() > torch.finfo(dtype).tiny
    assert ((tanh - true_tanh) / true_tanh)[normal].abs().max() < tanh_bound
    assert (tanh - true_tanh)[~normal].abs().max() <= torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_activations_at_infinity_and_nan(dtype, instruction_set):
    # NaN payloads too: an exponent built in integer arithmetic could turn one into a number.
    payload = torch.tensor([0x7FC00001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    nans = torch.cat((payload.to(dtype), torch.tensor([math.nan, -math.nan], dtype=dtype)))
    for y in torch.ops.fastlstm._activations(nans):
        assert y.isnan().all()
    sigmoid, tanh = torch.ops.fastlstm._activations(
        torch.tensor([math.inf, -math.inf, 0.0], dtype=dtype)
    )
    assert tanh.tolist() == [1, -1, 0]
    assert sigmoid[0] == 1
    assert 0 <= sigmoid[1].item() < 1e-37
    assert sigmoid[2] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_as_torch_rounds(dtype, instruction_set):
    """All 65,536 values survive, and sums of two round to nearest even."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    _, tanh = torch.ops.fastlstm._activations(every)
    expected = torch.tanh(every.double())
    # One rounding of a float that is itself within 3e-7: never further than half a unit and that.
    spacing = torch.stack(
        [
            torch.nextafter(tanh, torch.full_like(tanh, to)).double() - tanh.double()
            for to in (2, -2)
        ]
    )
    bound = 0.5 * spacing.abs().amax(0) + 4e-7 * expected.abs()
    assert ((tanh.double() - expected).abs() <= bound).all()


def test_kernels_of_one_instruction_set_show_the_linker_their_table_alone():
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    objects = sorted(Path(__file__).parents[1].glob("build/temp*/fastlstm._C/kernels_*.o"))
    if not objects:
        pytest.skip("no object files: the package was built elsewhere")
    kinds = ["f32", "f64", "bf16", "f16", "generate"]
    sets = {path.stem.split("_")[1] for path in objects}
    bf16_alone = sets & {"avx512dot", "amx"}
    own = {f"kernels_{name}_{kind}" for name in sets - bf16_alone for kind in kinds}
    assert {path.stem for path in objects} == own | {f"kernels_{name}_bf16" for name in bf16_alone}
    for path in objects:
        lines = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        defined = [line.split()[-2:] for line in lines.splitlines() if len(line.split()) == 3]
        shared = [name for kind, name in defined if kind.isupper() or kind in "vw"]
        shared = [name for name in shared if not name.startswith("DW.ref.")]
        assert len(shared) == 1, f"{path.name} shares {shared}"
        assert path.stem.removeprefix("kernels_") in shared[0]


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.parametrize("name", _C.cpu_supported())
def test_environment_chooses_the_instruction_set(name):
    found = run_python(
        "import fastlstm; from fastlstm import _C; print(_C.cpu_selected())", FASTLSTM_CPU_ISA=name
    )
    assert found.stdout.strip() == name, found.stderr


def test_unknown_instruction_set_is_refused():
    found = run_python("import fastlstm", FASTLSTM_CPU_ISA="mmx")
    assert found.returncode != 0
    assert "FASTLSTM_CPU_ISA='mmx': expected one of" in found.stderr
    with pytest.raises(ValueError, match="mmx"):
        _C.cpu_select("mmx")


def test_import_needs_torch_alone():
    """Nothing of what the trainer needs is imported with the package."""
    found = run_python(
        "import sys, torch; before = set(sys.modules); import fastlstm; "
        "print([m for m in ('tqdm', 'safetensors', 'matplotlib', 'pooch') "
        "if m in sys.modules and m not in before])"
    )
    assert found.stdout.strip() == "[]", found.stderr
