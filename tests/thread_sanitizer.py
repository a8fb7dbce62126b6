"""Programs that are built and run under the thread sanitizer."""

import subprocess

import pytest


def run_program(folder, sources):
    """The exit status and output of a program of C++ files, whose headers stand in ``folder``."""
    program = folder / "check"
    command = ["g++", "-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{folder}",
               *map(str, sources), "-o", str(program)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if "libtsan" in built.stderr:
        pytest.skip("no thread sanitizer is installed")
    assert built.returncode == 0, built.stderr
    # The sanitizer asks for addresses that the kernel may have given away at random.
    ran = subprocess.run(
        ["setarch", "-R", str(program)], capture_output=True, text=True, timeout=600
    )
    output = ran.stdout + ran.stderr
    if "unexpected memory mapping" in output:
        pytest.skip("the thread sanitizer does not run on this kernel")
    return ran.returncode, output


def changed(text, change):
    """A source with one place replaced; ``change``: before and after, or None."""
    if change is None:
        return text
    before, after = change
    assert text.count(before) == 1
    return text.replace(before, after)
