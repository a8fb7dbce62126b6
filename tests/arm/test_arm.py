"""The CPU kernels on 64-bit ARM, run by an emulator: the portable baseline in registers of NEON.

`make arm` runs these; the ordinary suite leaves them out. Nothing is timed: an emulator's times
mean nothing. An emulator on x86-64 keeps that processor's order of memory accesses, too, so races
that only ARM's weaker order shows are not seen.
"""

import math
import re
import shutil
import subprocess

import pytest
import torch
from arm_kernels import (
    DISASSEMBLER,
    FOLDER,
    Activations,
    Kernels,
    Texts,
    activations,
    make,
    missing,
)
from arm_kernels import run as run_call
from generation_models import assert_greedy, primed, state
from generation_models import make as make_model
from simt_library import _Forward

from benchmarks.problems import NORMED, OPTIONS, Problem, outputs_and_gradients, tolerance
from benchmarks.problems import make as make_problem
from fastlstm import reference
from fastlstm.generation.draw import Draw
from fastlstm.generation.generate import _module, run
from fastlstm.generation.packed_weights import pack, rounded
from fastlstm.ops.native import DTYPES

pytestmark = [pytest.mark.arm, pytest.mark.skipif(missing() != "", reason=missing())]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session")
def driver():
    return make()


def check(driver, p, threads=(1, 2)):
    """Outputs and gradients are the reference's, and the same bits for every number of threads."""
    x = make_problem(p)
    first, *others = (outputs_and_gradients(Kernels(driver, n).lstm, x) for n in threads)
    expected = outputs_and_gradients(reference.lstm, x.to(torch.float64))
    for ours, theirs in zip(first, expected, strict=True):
        floor = 1e-2 * max(b.norm() for b in theirs)  # see benchmarks.problems.TOLERANCE
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape
            error = (a.double() - b).norm() / torch.maximum(b.norm(), floor).clamp_min(1e-6)
            assert error < tolerance(p), f"{j} of {p}: relative error {error:.2e}"
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- the build ----


def test_the_whole_module_compiles_without_warnings(driver):
    """As setup.py compiles it on such a machine; linking needs that machine's torch."""
    objects = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.o")}
    assert {"module.o", "ops_cpu.o", "ops_generate.o", "ops_packed.o"} <= objects
    assert {name for name in objects if name.startswith("cpu/isa/")} == {
        f"cpu/isa/baseline/{name}.o" for name in ("f32", "f64", "bf16", "f16", "generate")
    }


@pytest.mark.skipif(shutil.which(DISASSEMBLER) is None, reason="needs a disassembler for ARM")
@pytest.mark.parametrize(
    ("table", "lanes"), [("f32", "4s"), ("f64", "2d"), ("bf16", "4s"), ("f16", "4s")]
)
def test_products_are_fused_multiply_adds_of_whole_registers(table, lanes, driver):
    """Lanes are multiplied alone in what is not a product, and seldom."""
    path = FOLDER / "cpu" / "isa" / "baseline" / f"{table}.o"
    command = [DISASSEMBLER, "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole = len(re.findall(rf"\bfmla\s+v\d+\.{lanes}", text))
    alone = len(re.findall(r"\bfmadd\b", text))
    assert whole > 500
    assert alone < whole / 20


# ---- the call ----


def test_a_kernel_that_writes_past_a_tensor_is_seen(driver):
    tensors = [torch.zeros(5) for _ in range(3)]
    for count in (5, 6):
        call = Activations(DTYPES.index(torch.float32), count, *(x.data_ptr() for x in tensors))
        if count == 5:
            run_call(driver, "activations", 1, call, [], tensors)
            assert tensors[1].tolist() == [0.5] * 5
        else:
            with pytest.raises(AssertionError, match="a kernel wrote past its memory"):
                run_call(driver, "activations", 1, call, [], tensors)


def test_structs_of_another_size_are_refused(driver):
    with pytest.raises(AssertionError, match=r"the call's struct has \d+ bytes, not \d+"):
        run_call(driver, "backward", 1, _Forward(), [], [])


# ---- the layer ----


@every_dtype
@pytest.mark.parametrize("name", OPTIONS | NORMED)
def test_kernels_match_the_reference(name, dtype, driver):
    check(driver, Problem(dtype=dtype, **(OPTIONS | NORMED)[name]))


@every_dtype
@pytest.mark.parametrize("batch", [1, 7, 17])
@pytest.mark.parametrize("hidden", [1, 3, 31, 129])
def test_kernels_at_odd_sizes(hidden, batch, dtype, driver):
    check(
        driver,
        Problem(hidden_size=hidden, input_size=hidden + 2, batch=batch, steps=7, dtype=dtype),
    )


@every_dtype
def test_the_gradient_of_all_cells(dtype, driver):
    check(driver, Problem(dtype=dtype, num_layers=2, cells=True))


@every_dtype
@pytest.mark.parametrize("batch", [1, 5])
def test_results_do_not_depend_on_the_threads(batch, dtype, driver):
    """Large enough for teams of threads, and for parts of the batch, in both directions."""
    p = Problem(
        hidden_size=150, input_size=40, batch=batch, steps=12, num_layers=2, bidirectional=True,
        proj_size=35, packed=True, dtype=dtype,
    )  # fmt: skip
    check(driver, p, threads=(1, 2, 3, 6))


@every_dtype
@pytest.mark.parametrize("name", ["plain", "zero states", "everything", "layer norm, every rule"])
def test_inference_gives_the_bits_of_training_with_weights_packed_before_too(name, dtype, driver):
    x = make_problem(Problem(dtype=dtype, **(OPTIONS | NORMED)[name]))
    expected = Kernels(driver).lstm(*x.arguments)
    for prepacked in (False, True):
        found = Kernels(driver, 2, saves=False, prepacked=prepacked).lstm(*x.arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- the cell's functions ----


@pytest.mark.parametrize(
    ("dtype", "sigmoid_bound", "tanh_bound"),
    [(torch.float32, 2e-7, 3e-7), (torch.float64, 4e-16, 1e-15)],
    ids=str,
)
def test_activations_keep_their_error_bound(dtype, sigmoid_bound, tanh_bound, driver):
    x = torch.cat(
        (torch.logspace(-37, 37, 5001, dtype=torch.float64), torch.linspace(0, 30, 50001))
    )
    x = torch.cat((x, -x)).to(dtype)
    sigmoid, tanh = (y.double() for y in activations(driver, x))
    exact = torch.tanh(x.double())
    assert (sigmoid - torch.sigmoid(x.double())).abs().max() < sigmoid_bound
    assert ((tanh - exact) / exact)[x != 0].abs().max() < tanh_bound


@every_dtype
def test_activations_at_infinity_and_nan(dtype, driver):
    x = torch.tensor([math.inf, -math.inf, 0.0, math.nan, -math.nan], dtype=dtype)
    sigmoid, tanh = activations(driver, x)
    assert tanh[:3].tolist() == [1, -1, 0]
    assert sigmoid[:3].tolist() == [1, pytest.approx(0, abs=1e-37), 0.5]
    assert sigmoid[3:].isnan().all()
    assert tanh[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_survive_and_round_within_half_a_unit(dtype, driver):
    """tanh of small numbers is the number itself: all of these come back as they were."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    _, tanh = activations(driver, every)
    small = every.double().abs() < torch.finfo(dtype).eps
    assert torch.equal(tanh[small], every[small])
    # Half a unit of the last place, and the error of a float.
    exact = torch.tanh(every.double())
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((tanh.double() - exact).abs() <= 0.5 * unit + 4e-7 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_number_halfway_between_two_rounds_to_the_even_one(dtype, driver):
    """c_n = c_0 + 1, where neighbours of the type are 2 apart."""
    x = make_problem(Problem(input_size=1, hidden_size=4, batch=1, steps=1, dtype=dtype))
    first = 2 / torch.finfo(dtype).eps
    with torch.no_grad():
        for weight in x.weights:
            weight.zero_()
        x.weights[2].copy_(torch.tensor([100.0, 100.0, 20.0, 0.0]).repeat_interleave(4))
        x.c0.copy_(first + torch.tensor([0, 2, 4, 6]))
    c_n = Kernels(driver).lstm(*x.arguments)[2]
    assert (c_n - first).flatten().tolist() == [0, 4, 4, 8]


# ---- text ----

SEED = torch.tensor([2**40 + 11])
MODELS = {
    "one of everything": (1, 1, 1, 1, {}),
    "three": (5, 3, 2, 2, {}),
    "seven": (64, 7, 3, 3, {}),
    "thirty-three": (130, 33, 2, 5, {}),
    "129": (65, 129, 2, 7, {}),
    "no bias": (9, 33, 2, 1, {"bias": False}),
    "projection": (9, 33, 2, 3, {"proj_size": 5}),
    "zoneout and clipping": (9, 33, 2, 3, {"zoneout_h": 0.2, "zoneout_c": 0.3, "cell_clip": 0.5}),
}
STORAGES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32,
            "int8": torch.float32}  # fmt: skip
DRAWS = {
    "free": Draw(1.0, seed=SEED),
    "top-k": Draw(1.0, 3, seed=SEED),
    "nucleus": Draw(1.2, None, 0.8, SEED),
    "both": Draw(1.0, 4, 0.9, SEED),
}


def packed_model(name, storage):
    vocabulary, hidden, layers, batch, options = MODELS[name]
    dtype = STORAGES[storage]
    lstm, decoder = make_model(vocabulary, hidden, layers, dtype=dtype, **options)
    weights, stack, head = _module(lstm, decoder)
    packed = pack(weights, stack, head.weight, head.bias, storage)
    return lstm, decoder, packed, primed(vocabulary, batch=batch), state(lstm, batch)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("zoneout")])
def test_greedy_text_is_the_likeliest(name, storage, driver):
    """Against the float64 reference with the weights as they are stored."""
    lstm, decoder, packed, prime, hx = packed_model(name, storage)
    if storage != "fp64":
        with torch.no_grad():
            for key, p in (*lstm.named_parameters(), *decoder.named_parameters()):
                if p.dim() == 2 and key != "weight_ih_l0":
                    p.copy_(rounded(p, storage))
    bound = {"fp64": 1e-12, "int8": 5e-5}.get(storage, 1e-5)  # int8 reads h in 16 bits
    first = None
    for threads in (1, 2):
        tokens, found = Texts(driver, threads).text(packed, prime, 12, hx, Draw(0.0))
        assert_greedy(lstm, decoder, prime, tokens, found, hx, bound)
        first = first or (tokens, *found)
        assert all(torch.equal(a, b) for a, b in zip(first, (tokens, *found), strict=True))


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_drawn_text_is_that_of_this_processor(name, storage, how, driver):
    _, _, packed, prime, hx = packed_model(name, storage)
    tokens, found = Texts(driver, 2).text(packed, prime, 12, hx, DRAWS[how])
    expected_tokens, expected = run(packed, None, prime, 12, hx, DRAWS[how])
    assert torch.equal(tokens, expected_tokens)
    bound = {"fp64": 1e-12, "int8": 5e-5}.get(storage, 1e-5)  # int8 reads h in 16 bits
    assert all((a - b).abs().max() <= bound for a, b in zip(found, expected, strict=True))
