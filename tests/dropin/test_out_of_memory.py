"""Where memory runs out: torch's own exceptions and words, and a module that goes on working."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlstm.ops import native

ROOT = Path(__file__).parents[2]

LIMITED = """
import resource, torch, fastlstm
lstm = fastlstm.LSTM(8, 512, 2)
small = torch.randn(2, 3, 8)
expected = lstm(small)[0].detach()

def torchs_own():
    try:
        torch.empty(1 << 40)
    except RuntimeError as error:
        return error

def ours(call):
    try:
        call()
    except RuntimeError as error:
        return error

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
large = torch.zeros(10_000, 600, 8)
with torch.no_grad():
    errors = [ours(lambda: lstm(large))]
errors += [ours(lambda: lstm(large))]
y = lstm(torch.zeros(20, 600, 8))[0].sum()
held = []
try:
    while True:
        held.append(torch.empty(1 << 24, dtype=torch.uint8))
except RuntimeError:
    pass
errors += [ours(y.backward)]
for error in errors:
    words = "DefaultCPUAllocator: can't allocate memory" in str(error)
    print(type(error) is type(torchs_own()), words)
del held
torch.testing.assert_close(lstm(small)[0], expected)
lstm(small)[0].sum().backward()
print("still usable")
"""


def test_a_cpu_without_memory_raises_what_torchs_allocator_says():
    if sys.platform != "linux":
        pytest.skip("the address space is limited, which takes Linux")
    limited = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert limited.stdout == "True True\n" * 3 + "still usable\n", limited.stderr


def refusing(text):
    def operator():
        raise RuntimeError(text)

    return operator


NOT_ALLOCATED = "fastlstm: cannot allocate 1024 bytes on cuda:0: CUDA out of memory. Tried it."


def test_a_gpu_without_memory_raises_torchs_own_exception(monkeypatch):
    asked = []

    def empty(size, dtype, device):
        asked.append((size, dtype, device))
        raise torch.OutOfMemoryError("CUDA out of memory. In torch's words")

    monkeypatch.setattr(native.torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match="In torch's words"):
        native.call(refusing(NOT_ALLOCATED))
    assert asked == [(1024, torch.uint8, "cuda:0")]


def test_a_gpu_that_fails_otherwise_is_not_called_full(monkeypatch):
    """A device that an earlier kernel left broken refuses memory too."""

    def empty(size, dtype, device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(native.torch, "empty", empty)
    with pytest.raises(RuntimeError, match="device-side assert") as raised:
        native.call(refusing(NOT_ALLOCATED))
    assert not isinstance(raised.value, torch.OutOfMemoryError)


def test_memory_that_is_free_again_after_the_call_was_short_in_it(monkeypatch):
    monkeypatch.setattr(native.torch, "empty", lambda size, dtype, device: None)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape("CUDA out of memory. Tried it.")):
        native.call(refusing(NOT_ALLOCATED))


def test_memory_that_torchs_products_lack_is_torchs_exception_too():
    text = "fastlstm: aten::mm.out failed: CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        native.call(refusing(text))


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, IndexError])
def test_other_errors_pass_as_they_are(kind):
    error = kind("fastlstm: expected 4 weights, got 3")

    def operator():
        raise error

    with pytest.raises(kind) as raised:
        native.call(operator)
    assert raised.value is error
