"""Memory that is kept from call to call: csrc/scratch.h, and the tensors that lie in it."""

import copy
import io
from pathlib import Path

import pytest
import torch
from thread_sanitizer import changed, run_program

import fastlstm
from fastlstm import _C

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def check(folder, change=None):
    """The exit status and output of the checking program, of a changed scratch.cpp."""
    (folder / "scratch.h").write_text((ROOT / "csrc/scratch.h").read_text())
    (folder / "scratch.cpp").write_text(changed((ROOT / "csrc/scratch.cpp").read_text(), change))
    return run_program(folder, [HERE / "scratch_check.cpp", folder / "scratch.cpp"])


def test_no_two_threads_hold_the_same_memory_and_little_of_it_is_kept(tmp_path):
    assert check(tmp_path) == (0, "")


BUGS = {
    "a block that is taken and stays in the list": (
        "blocks_.erase(blocks_.begin() + int64_t(j));", "",
    ),
    "a block that is too small": ("(block = kept.first[size])", "(block = kept.first[size / 2])"),
    "a process that keeps everything": ("while (bytes_ > kMostKeptByProcess)", "while (false)"),
    "a thread that keeps everything": ("kept.bytes + block->bytes > kMostKeptByThread", "false"),
    "a list that threads change at once": (
        "    std::lock_guard<std::mutex> lock(mutex_);\n    blocks_.push_back(block);",
        "    blocks_.push_back(block);",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_seen(change, tmp_path):
    status, _ = check(tmp_path, change)
    assert status != 0


# What forward keeps until backward is 9 MB, and each gradient of a weight 1.4.
def large_call():
    torch.manual_seed(1)
    lstm, x = fastlstm.LSTM(300, 300), torch.randn(40, 40, 300, requires_grad=True)
    return lstm, x


@pytest.mark.usefixtures("one_thread")  # of several each keeps what its tasks took
def test_a_training_step_uses_the_memory_of_the_step_before():
    lstm, x = large_call()
    kept = []
    for _ in range(3):
        lstm.zero_grad()
        lstm(x)[0].sum().backward()
        kept.append(_C.kept_scratch())
    assert kept[1] == kept[2]
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.11":
        assert kept[2][1] >= 4 * 1600 * 1200
    fastlstm.empty_cache()
    assert _C.kept_scratch() == (0, 0)


def test_calls_whose_backward_waits_do_not_share_memory():
    lstm, x = large_call()
    other = torch.randn_like(x)
    expected = []
    for values in (x, other):
        expected.append(torch.autograd.grad(lstm(values)[0].square().sum(), lstm.weight_hh_l0)[0])
    ys = [lstm(values)[0] for values in (x, other)]
    for y, gradient in reversed(list(zip(ys, expected, strict=True))):
        actual = torch.autograd.grad(y.square().sum(), lstm.weight_hh_l0)[0]
        assert torch.equal(actual, gradient)


def test_gradients_can_be_kept_copied_shared_and_saved():
    lstm, x = large_call()
    lstm(x)[0].sum().backward()
    gradient = lstm.weight_ih_l0.grad
    values = gradient.clone()
    for _ in range(2):  # into the same gradients, and with others beside them
        lstm(x)[0].sum().backward()
    assert torch.equal(gradient, 3 * values)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    gradient.share_memory_()
    for same in (copy.deepcopy(gradient), torch.load(file), torch.from_numpy(gradient.numpy())):
        assert torch.equal(same, gradient)
    assert gradient.is_shared()
