"""The build: error bounds of the activations, and no instruction set leaks into another."""

import math
import platform
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
    """All 65,536 values survive, and sums of two round to nearest even.

    bfloat16's own instructions make zeros of subnormals, in nn.LSTM too.
    """
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
    if dtype == torch.bfloat16 and instruction_set in ("avx512_bf16", "amx"):
        tiny = torch.finfo(dtype).tiny
        subnormal = (expected.abs() < tiny) & (tanh == 0)
        bound = torch.where(subnormal, tiny, bound)
    assert ((tanh.double() - expected).abs() <= bound).all()


def test_kernels_of_one_instruction_set_show_the_linker_their_table_alone():
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    objects = sorted(Path(__file__).parents[2].glob("build/temp*/fastlstm._C/cpu/isa/*/*.o"))
    if not objects:
        pytest.skip("no object files: the package was built elsewhere")
    kinds = ["f32", "f64", "bf16", "f16", "generate"]
    tables = {f"{path.parent.name}_{path.stem}": path for path in objects}
    sets = {path.parent.name for path in objects}
    bf16_alone = sets & {"avx512dot", "amx"}
    whole = {f"{name}_{kind}" for name in sets - bf16_alone for kind in kinds}
    assert set(tables) == whole | {f"{name}_bf16" for name in bf16_alone}
    for table, path in tables.items():
        lines = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        defined = [line.split()[-2:] for line in lines.splitlines() if len(line.split()) == 3]
        shared = [name for kind, name in defined if kind.isupper() or kind in "vw"]
        shared = [name for name in shared if not name.startswith("DW.ref.")]
        assert len(shared) == 1, f"{path} shares {shared}"
        assert table in shared[0]


AVX512 = ["-DFASTLSTM_VEC_BYTES=64", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TILES = ["-DFASTLSTM_VEC_BYTES=64", "-DFASTLSTM_BF16_PAIRS=1", "-DFASTLSTM_AMX=1"]


def test_every_header_of_the_cpu_kernels_compiles_alone():
    """It includes what it uses: no file must know what to include before it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = Path(__file__).parents[2] / "csrc"
    needs = {"avx512.h": AVX512, "gemm_tiles.h": TILES}
    headers = {path.name: path for path in source.glob("cpu/*.h")}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        del headers["avx512.h"]
    others = [path for name, path in headers.items() if name not in needs]
    others += [source / f"{name}.h" for name in ("cell", "draw", "dropout", "lstm", "rules")]
    builds = [(["-DFASTLSTM_VEC_BYTES=16"], others)]
    builds += [(flags, [headers[name]]) for name, flags in needs.items() if name in headers]
    for flags, paths in builds:
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-psabi", *flags, "-x", "c++"]
        done = subprocess.run([*command, *paths], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("name", _C.cpu_supported())
def test_environment_chooses_the_instruction_set(name):
    result = run_python(
        "import fastlstm; from fastlstm import _C; print(_C.cpu_selected())", FASTLSTM_CPU_ISA=name
    )
    assert result.stdout.strip() == name, result.stderr


def test_unknown_instruction_set_is_refused():
    result = run_python("import fastlstm", FASTLSTM_CPU_ISA="mmx")
    assert result.returncode != 0
    assert "FASTLSTM_CPU_ISA='mmx': expected one of" in result.stderr
    with pytest.raises(ValueError, match="mmx"):
        _C.cpu_select("mmx")


def test_import_needs_torch_alone():
    """Nothing of what the trainer needs is imported with the package."""
    result = run_python(
        "import sys, torch; before = set(sys.modules); import fastlstm; "
        "print([m for m in ('tqdm', 'safetensors', 'matplotlib', 'pooch') "
        "if m in sys.modules and m not in before])"
    )
    assert result.stdout.strip() == "[]", result.stderr
