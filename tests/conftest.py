"""What several test files share: a module of torch's beside ours, and how to compare them."""

import copy
import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from trainer import TEXT

import fastlstm
from benchmarks import accuracy
from fastlstm import _C
from fastlstm.ops.native import missing_on_gpu

ROOT = Path(__file__).parent


def no_cuda():
    """Why tests marked ``cuda`` cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU that torch can use"
    return missing_on_gpu(torch.cuda.current_device())


# Files that take half a minute and more of processor time, the longest first.
LONG = [
    *("cuda/test_compile_gate.py", "cuda/test_emulated_cluster_backward.py"),
    *("cuda/test_emulated_generate.py", "cuda/test_emulated_grid.py"),
    *("cuda/test_emulated_cluster.py", "test_torch_versions.py", "cuda/test_emulated_stepwise.py"),
    *("ops/test_operators.py", "benchmarks/test_suite.py", "cuda/test_emulated_cluster_fp32.py"),
    *("text/test_train_resume.py", "ops/test_cpu_wide.py"),
]


def pytest_collection_modifyitems(config, items):
    """pytest-xdist's workers get files in this order, and end together where the last are short."""
    if not hasattr(config, "workerinput"):
        return
    place = {(ROOT / file).resolve(strict=True): j for j, file in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is not None:
        reason = no_cuda()
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def kept_memory():
    """A worker does not keep the memory of one file's tests beside the next one's."""
    yield
    fastlstm.empty_cache()
    _trim()


MUCH = 64 << 20  # bytes


def _resident():
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


def _trim():
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def much_memory():
    """Nor does it keep what a test freed, where that is much, as the emulator does."""
    before = _resident()
    yield
    if _resident() > before + MUCH:
        _trim()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where a test runs: on the CPU in the ordinary suite, and on a GPU with ``-m cuda``."""
    return request.param


@pytest.fixture
def exact_products():
    """float32 without tf32, for RNNs and products alike."""
    with accuracy.precision("fp32"):
        yield


@pytest.fixture(params=_C.cpu_supported())
def instruction_set(request):
    """Every instruction set of this processor in turn."""
    before = _C.cpu_selected()
    _C.cpu_select(request.param)
    yield request.param
    _C.cpu_select(before)


def in_newer_words(text):
    """An error of torch's as its release 2.13 puts it, which is how ours are put."""
    return re.sub(
        r"input must have the type (\S+), got type (\S+)",
        r"RNN input dtype (\2) does not match weight dtype (\1). "
        r"Convert input: input.to(\1), or convert model: model.to(\2)",
        text,
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def twins():
    """Make ``(theirs, ours)``: an ``nn.LSTM`` and a ``fastlstm.LSTM`` of equal weights."""

    def make(*sizes, **options):
        theirs = nn.LSTM(*sizes, **options)
        ours = fastlstm.LSTM(*sizes, **options)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return make


@pytest.fixture(scope="session")
def outcome():
    """Run a module forward and backward: every output and gradient by name."""

    def run(module, input, hx=None):
        """Gradients arrive at all three outputs; input and hx are copied and become leaves.

        The gradients that arrive are the same for every device and dtype.
        """
        input, hx = copy.deepcopy((input, hx))
        data = input.data if isinstance(input, PackedSequence) else input
        leaves = {"input": data} if data.is_floating_point() else {}
        if hx is not None:
            leaves |= {"h_0": hx[0], "c_0": hx[1]}
        for leaf in leaves.values():
            leaf.requires_grad_()
        leaves |= dict(module.named_parameters())
        output, (h_n, c_n) = module(input, hx)
        y = output.data if isinstance(output, PackedSequence) else output
        results = {"output": y, "h_n": h_n, "c_n": c_n}
        generator = torch.Generator().manual_seed(1)
        arriving = [torch.randn(x.shape, generator=generator).to(x) for x in results.values()]
        grads = torch.autograd.grad(list(results.values()), list(leaves.values()), arriving)
        for name, grad in zip(leaves, grads, strict=True):
            results[f"grad {name}"] = grad
        return {name: x.detach() for name, x in results.items()}

    return run


@pytest.fixture(scope="session")
def assert_close():
    """Compare two outcomes: same names, shapes and dtypes, values close beside the largest."""

    def check(actual, expected, tolerance):
        assert actual.keys() == expected.keys()
        for name, a in actual.items():
            b = expected[name]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if b.numel():
                bound = tolerance * max(b.abs().max().item(), 1e-3)
                assert (a - b).abs().max().item() <= bound, name

    return check


@pytest.fixture
def text(tmp_path):
    """A file of text that a tiny model learns in seconds."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """A file of text with which a tiny model is busy for longer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"line {j}: the quick brown fox, {j * 7919 % 97}\n" for j in range(300))
    )
    return path
