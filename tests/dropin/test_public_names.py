"""What a user sees of the package: its names, and which of a model's modules are its own."""

import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from torch import nn

import fastlstm

ROOT = Path(__file__).parents[2]


def test_dir_shows_what_the_pages_name_and_no_module_beside():
    names = dir(fastlstm)
    assert set(fastlstm.__all__) <= set(names)
    assert names == sorted(set(names))
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name in names:
        assert hasattr(fastlstm, name)
        assert f"fastlstm.{name}" in pages or name == "__version__", name


def test_print_tells_our_modules_from_torchs():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "cell": nn.LSTMCell(3, 4)})
    before = repr(model)
    fastlstm.from_torch(model)
    expected = "  (rnn): fastlstm.LSTM(4, 4)\n  (cell): fastlstm.LSTMCell(3, 4)\n"
    assert repr(model) == f"ModuleDict(\n{expected})"
    assert repr(fastlstm.to_torch(model)) == before
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    assert "(rnn): fastlstm.ParametrizedLSTM(" in repr(fastlstm.from_torch(model))


def test_print_leaves_a_subclass_its_name():
    class Mine(fastlstm.LSTM):
        pass

    assert repr(Mine(3, 4)) == "Mine(3, 4)"


NAMES = ("info", "train", "sample", "inspect", "compare")
COMMANDS = ["fastlstm", *(f"fastlstm.{name}" for name in NAMES)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_environment_is_one_line(command, monkeypatch):
    """Though it is the import of the package that fails, before the command begins."""
    monkeypatch.setenv("FASTLSTM_CPU_ISA", "avx9")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", command],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert f"{command}: error: FASTLSTM_CPU_ISA='avx9': expected one of " in process.stderr


def test_the_console_script_has_one_line_for_it_too(monkeypatch):
    monkeypatch.setenv("FASTLSTM_ALGO", "fastest")
    code = "import sys; sys.argv = ['/usr/bin/fastlstm', 'info']; import fastlstm"
    script = fork_server.run("-W", "ignore", "-c", code, cwd=ROOT)
    assert (script.returncode, script.stdout) == (2, "")
    assert script.stderr.startswith("fastlstm: error: FASTLSTM_ALGO: expected one of auto")
    assert script.stderr.count("\n") == 1


def test_another_program_gets_the_exception(monkeypatch):
    monkeypatch.setenv("FASTLSTM_ALGO", "fastest")
    for argv in (["x.py"], ["-m"], []):
        code = f"import sys; sys.argv = {argv}; import fastlstm"
        process = fork_server.run("-c", code, cwd=ROOT)
        assert process.returncode == 1
        assert "ValueError: FASTLSTM_ALGO: expected one of auto" in process.stderr
