"""On a GPU the module runs beside other work: nothing waits, leaks, breaks or lies."""

import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from conftest import no_cuda

import fastlstm


@pytest.fixture
def no_waiting():
    """A region in which every wait of the host for the GPU is an error."""

    @contextmanager
    def region():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return region


def step(lstm, x, **more):
    y, (h_n, c_n) = lstm(x, **more)
    (y.square().sum() + h_n.sum() + c_n.sum()).backward()
    return y


FORMS = {
    "plain": ({}, torch.float32, {}),
    "both directions, half": ({"bidirectional": True}, torch.bfloat16, {}),
    "dropout": ({"dropout": 0.5}, torch.float32, {}),
    "projection": ({"proj_size": 8}, torch.float16, {}),
    "layer norm": ({"layer_norm": True}, torch.float32, {}),
    "zoneout": ({"zoneout_h": 0.1, "zoneout_c": 0.1}, torch.float32, {}),
    "device lengths": ({"bidirectional": True}, torch.float32, {"lengths": [3, 7, 1, 5]}),
}


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", [False, True])
def test_the_host_never_waits(index, form, no_waiting):
    options, dtype, more = FORMS[form]
    lstm = fastlstm.LSTM(6, 16, 2, **options, dtype=dtype, device="cuda")
    if index:
        x = torch.randint(6, (7, 4), device="cuda")
    else:
        x = torch.randn(7, 4, 6, device="cuda", dtype=dtype, requires_grad=True)
    given = {name: torch.tensor(value, device="cuda") for name, value in more.items()}
    step(lstm, x, **given)  # what is set up once
    with no_waiting():
        step(lstm, x, **given)


@pytest.mark.cuda
def test_a_wait_would_be_seen(no_waiting):
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros(1, device="cuda").item()


@pytest.mark.cuda
def test_memory_does_not_grow():
    lstm = fastlstm.LSTM(32, 64, 2, bidirectional=True, dropout=0.3, device="cuda")
    x = torch.randn(30, 8, 32, device="cuda")
    held = []
    for n in range(110):
        lstm.zero_grad(set_to_none=True)
        step(lstm, x)
        if n in (9, 109):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1]


@pytest.mark.cuda
@pytest.mark.parametrize("training", [True, False])
def test_out_of_memory_raises_and_the_module_goes_on(training):
    lstm = fastlstm.LSTM(64, 256, 2, device="cuda")
    small = torch.randint(64, (5, 4), device="cuda")
    large = torch.randint(64, (4000, 512), device="cuda")  # its output alone takes 2 GB
    with torch.no_grad():
        expected = lstm(small)[0]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    allowed = torch.cuda.memory_reserved() + 256 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        for _ in range(3):
            with torch.set_grad_enabled(training), pytest.raises(torch.OutOfMemoryError):
                lstm(large)
        torch.testing.assert_close(lstm(small)[0], expected)
        step(lstm, small)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(p.grad.isfinite().all() for p in lstm.parameters())


def assert_threads_agree(modules, device, dtype=torch.float32):
    """A thread for each module, on a stream of its own, gets the bits that it gets alone."""
    inputs = [torch.randn(20, 6, 8, device=device, dtype=dtype) for _ in modules]

    def results(i):
        y = modules[i](inputs[i])[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(modules[i].parameters()))]

    alone = [results(i) for i in range(2)]
    if device == "cuda":
        torch.cuda.synchronize()
    wrong, start = [], threading.Barrier(2)

    def work(i):
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            start.wait(60)
            with torch.cuda.stream(stream) if stream else nullcontext():
                for _ in range(20):
                    found = results(i)
                    if stream:
                        stream.synchronize()
                    if not all(map(torch.equal, found, alone[i])):
                        wrong.append(f"thread {i}: other bits")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_threads_at_once(device):
    options = {"bidirectional": True, "device": device}
    assert_threads_agree([fastlstm.LSTM(8, 40, 2, **options) for _ in range(2)], device)


@pytest.mark.cuda
def test_two_threads_with_models_of_different_sizes():
    """The same kernel, over the grid, with more shared memory in one thread than in the other."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    modules = [fastlstm.LSTM(8, hidden, **options) for hidden in (800, 1000)]
    assert_threads_agree(modules, "cuda", torch.bfloat16)


BAD_INDEX = """
import torch, fastlstm
lstm = fastlstm.LSTM(5, 8, device="cuda")
x = torch.tensor([[0, 1], [2, {index}]], device="cuda")
print("sum", lstm(x)[0].sum().item())
"""


@pytest.mark.cuda
@pytest.mark.parametrize("index", [5, -1, 2**33])
def test_a_bad_index_is_an_error_and_no_number(index):
    """As of F.embedding, the process's context is lost: hence a process of its own."""
    run = [sys.executable, "-c", BAD_INDEX.format(index=index)]
    found = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert found.returncode != 0
    assert "sum" not in found.stdout
    assert "CUDA error" in found.stderr
    good = subprocess.run(
        [sys.executable, "-c", BAD_INDEX.format(index=4)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert good.returncode == 0, good.stderr


def test_a_bad_index_on_the_cpu_names_itself():
    with pytest.raises(IndexError, match="the index 5, expected 0 to 4"):
        fastlstm.LSTM(5, 8)(torch.tensor([[0, 5]]))


@pytest.mark.skipif(no_cuda() is None, reason="there is a GPU")
def test_without_a_gpu_the_tests_for_one_say_why_they_do_not_run():
    run = [sys.executable, "-m", "pytest", "-m", "cuda", "-rs", __file__]
    found = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.returncode == 0, found.stdout
    assert "passed" not in found.stdout
    assert no_cuda() in found.stdout
    assert "deselected" in found.stdout
