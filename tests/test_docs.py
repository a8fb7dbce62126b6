"""What README and docs/ promise is there: links, code, flags and make's targets."""

import re
import subprocess
from pathlib import Path

import pytest
import setuptools

pytest.importorskip("safetensors")

import setup as build
from fastlstm import compare, inspect, sample
from fastlstm.text.training import options
from fastlstm.train import main as train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page):
    """As GitHub and MyST make them of headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_files_that_are_named_exist(page):
    """`csrc/cell.h`, `ops/test_operators.py::test_matches_reference`, and so on."""
    names = re.findall(
        r"`((?:csrc|fastlstm|tests|benchmarks|docs)/[\w/.\-]+\.\w+)`", page.read_text()
    )
    for name in names:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        file = ROOT / "tests" / name[0]
        assert file.exists(), name
        assert not name[1] or f"def {name[1]}" in file.read_text(), name


@pages
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if page.name == "runs.md":  # its first command has made this run
        pytest.importorskip("huggingface_hub")
        (tmp_path / "my.txt").write_text("Once upon a time there was a cat.\n" * 40)
        train(["--data", "my.txt", "--out", "runs/mine", "--steps", "20", "--hidden-size", "16",
               "--seq-length", "8", "--device", "cpu"])  # fmt: skip
    space = {}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
        exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), space)


COMMAND = r"fastlstm[. ](train|sample|inspect|compare)\b([^\n`#]*)"
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
PARSERS = {"train": options._parser(), "sample": sample.parser(), "inspect": inspect.parser(),
           "compare": compare.parser()}  # fmt: skip


@pages
def test_flags_exist(page):
    known = {name: set(parser._option_string_actions) for name, parser in PARSERS.items()}
    text = page.read_text().replace("\\|", "|")
    for name, rest in re.findall(COMMAND, text):
        assert set(FLAG.findall(rest)) <= known[name], (name, rest)
    if page.name in ("README.md", "training.md"):  # their tables are of these commands' flags
        rows = "\n".join(re.findall(r"^\| .*$", text, re.M))
        for span in re.findall(r"`([^`]*)`", rows):
            assert set(FLAG.findall(span)) <= set().union(*known.values()), span


@pages
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.M)
    assert set(named) <= targets


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # the tests themselves may run under make
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {line.split()[0] for line in said.splitlines()} == set(phony)


def test_make_says_what_it_installs_before_it_does():
    """Every step in one line of words, and not the command as well."""
    command = ["make", "--no-print-directory", "--dry-run", "train", "VENV=nowhere"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    slow = [j for j, line in enumerate(lines) if " -m " in line or " install " in line]
    assert len(slow) == 5
    for j in slow:
        assert re.fullmatch(r'echo "[a-z].+"', lines[j - 1])
    recipes = (ROOT / "Makefile").read_text().split("$(VENV)/.torch:\n")[1]
    assert all(line[1] == "@" for line in recipes.splitlines() if line.startswith("\t"))


def test_hooks_are_lints_tools():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for tool in ("ruff check", "ruff format", "clang-format", "mypy"):
        assert f"entry: {tool}" in hooks
        assert tool in lint


@pytest.mark.parametrize("name", ["ccache", "sccache"])
def test_a_compiler_cache_is_used_where_there_is_one(name, tmp_path, monkeypatch):
    cache = tmp_path / name
    cache.write_text("#!/bin/sh\n")
    cache.chmod(0o755)
    source = setuptools.Extension("fastlstm._C", ["csrc/module.cpp"])

    def command():
        text = build.ninja_file(source, build.find_torch(), tmp_path / "x")
        return re.search(r"rule compile\n  command = (.*) \$flags", text)[1]

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert command() == f"{cache} $cxx"
    monkeypatch.setenv("FASTLSTM_CCACHE", "0")
    assert command() == "$cxx"
