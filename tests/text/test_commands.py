"""``fastlstm COMMAND``: one name for every command, one line for every mistake."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

import fastlstm
from fastlstm import __main__ as command
from fastlstm import compare, info, inspect, sample
from fastlstm.text.training import options

ROOT = Path(fastlstm.__file__).parents[1]


def refused(capsys, main, *arguments):
    """The one line that a mistake gives."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    printed = capsys.readouterr()
    assert error.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_it_says_what_there_is(arguments, capsys):
    command.main(arguments)
    overview = capsys.readouterr().out
    assert f"fastlstm {fastlstm.__version__}" in overview
    listed = re.findall(r"^  (\w+) +\w.*$", overview, re.M)
    assert listed == list(command.COMMANDS)
    modules = {path.stem for path in (ROOT / "fastlstm").glob("*.py")
               if re.search(r"^def main\(argv", path.read_text(), re.M)}  # fmt: skip
    assert set(listed) == modules - {"__main__"}


def test_the_version_is_the_packages(capsys):
    command.main(["--version"])
    assert capsys.readouterr().out == f"fastlstm {fastlstm.__version__}\n"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_its_module(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastlstm"])
    usages = []
    for main, arguments in (
        (command.main, [name, "--help"]),
        (import_module(f"fastlstm.{name}").main, ["--help"]),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert not error.value.code
        usages.append(capsys.readouterr().out)
    assert usages[0] == usages[1]
    assert usages[0].startswith(f"usage: fastlstm {name} ")


@pytest.mark.parametrize(
    ("program", "usage"),
    [
        ("/usr/bin/fastlstm", "fastlstm sample"),
        ("/site-packages/fastlstm/__main__.py", "python -m fastlstm sample"),
        ("/site-packages/fastlstm/sample.py", "python -m fastlstm.sample"),
    ],
)
def test_the_usage_is_what_was_typed(program, usage, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert sample.parser().format_usage().startswith(f"usage: {usage} [-h]")


def test_the_console_script_is_this_command():
    script = re.search(r'^\[project.scripts\]\nfastlstm = "(.+):(.+)"$',
                       (ROOT / "pyproject.toml").read_text(), re.M)  # fmt: skip
    assert getattr(import_module(script[1]), script[2]) is command.main


def test_python_m_runs_it_and_passes_the_status_on():
    arguments = [sys.executable, "-W", "ignore", "-m", "fastlstm"]
    for rest, status, out, err in (
        (["--version"], 0, f"fastlstm {fastlstm.__version__}\n", ""),
        (["sample", "nowhere"], 2, "",
         "fastlstm.sample: error: nowhere is no run: it has no checkpoints\n"),
    ):  # fmt: skip
        process = subprocess.run([*arguments, *rest], capture_output=True, text=True, cwd=ROOT)
        assert (process.returncode, process.stdout, process.stderr) == (status, out, err)


MISSPELT = {
    "trian": "fastlstm: error: there is no command 'trian'; did you mean train?",
    "smaple x": "fastlstm: error: there is no command 'smaple'; did you mean sample?",
    "--versoin": "fastlstm: error: there is no flag '--versoin'; did you mean --version?",
    "xyzzy": "fastlstm: error: there is no command 'xyzzy'; fastlstm --help lists them",
    "train --hiden-size 8": "unrecognized arguments: --hiden-size 8; did you mean --hidden-size?",
    "train --sed=3": "unrecognized arguments: --sed=3; did you mean --seed?",
    "train --cell lsmt": "; did you mean lstm?",
    "train --precision bf61": "; did you mean bf16?",
    "train --preset karpaty": "; did you mean karpathy?",
    "sample x --temprature 1": "--temprature 1; did you mean --temperature?",
    "sample x --weights int": "; did you mean int8?",
    "inspect x --text y --checkpiont best": "did you mean --checkpoint?",
    "compare x y --oot z": "fastlstm.compare: error: unrecognized arguments: --oot z; did you mean "
    "--out?",
    "info --jsno": "fastlstm.info: error: unrecognized arguments: --jsno; did you mean --json?",
}


@pytest.mark.parametrize("line", MISSPELT)
def test_a_misspelt_name_gets_a_suggestion(line, capsys):
    printed = refused(capsys, command.main, *line.split())
    assert printed.endswith(MISSPELT[line] + "\n")
    name = line.split()[0] if line.split()[0] in command.COMMANDS else ""
    assert printed.startswith(f"fastlstm{name and '.'}{name}: error: ")


@pytest.mark.parametrize("line", ["train --colour red", "sample x y", "info -q"])
def test_what_is_like_nothing_gets_none(line, capsys):
    assert "did you mean" not in refused(capsys, command.main, *line.split())


def test_a_misspelt_option_in_a_file_gets_one_too(tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"hiden_size": 8}')
    printed = refused(capsys, command.main, "train", "--config", str(tmp_path / "options.json"))
    assert printed.endswith("unknown option 'hiden_size'; did you mean hidden_size?\n")


def test_every_parser_is_of_one_kind():
    """So that all of them answer mistakes alike."""
    commands = (sample, inspect, compare, info)
    parsers = [options._parser(), *(module.parser() for module in commands)]
    assert {type(parser) for parser in parsers} == {command.cli.Parser}


def test_closed_streams_stop_no_command(monkeypatch, tmp_path):
    """A service or a cron job may have closed them; a mistake still has its status."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    command.main(["info"])
    with pytest.raises(SystemExit) as error:
        command.main(["sample", str(tmp_path)])
    assert error.value.code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_no_memory_is_one_line(monkeypatch, capsys, rank):
    def full():
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nframe #0"
        )

    monkeypatch.setattr(info, "info", full)
    monkeypatch.setenv("LOCAL_RANK", str(rank))  # one of a team may be alone with it
    with pytest.raises(SystemExit) as error:
        command.main(["info"])
    assert error.value.code == 1
    line = "fastlstm.info: error: out of memory: DefaultCPUAllocator: can't allocate memory: you"
    assert capsys.readouterr().err == f"{line} tried 9 bytes\n"
