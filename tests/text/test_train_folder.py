"""A run's folder: one writer, whatever happens to it; readable; and whole when the disk is full."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest

pytest.importorskip("safetensors")

from trainer import TEXT, losses, refused, train, wait_for_step

from fastlstm import inspect, sample
from fastlstm.text.opening import load_model
from fastlstm.text.training import lock, records

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes that the tests start

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--dropout", "0.2", "--device", "cpu"),
    *("--batch-size", "4", "--seq-length", "8", "--eval-every", "3", "--sample-every", "0"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def stopped(tmp_path, text):
    train(*TINY, "--data", text, "--out", tmp_path / "run", "--steps", 6)
    return tmp_path / "run"


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def start(*arguments, code="", cwd=ROOT, **options):
    """The trainer in a process of its own, after some ``code``."""
    code += "\nimport sys; from fastlstm.train import main; main(sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return fork_server.start("-c", code, *arguments, cwd=cwd, env=environment, **options)


def test_a_run_that_is_being_written_is_read_but_not_written_by_others(tmp_path, text, capsys):
    run = tmp_path / "run"
    process = start(*TINY, "--data", text, "--out", run, "--steps", 10**6)
    wait_for_step(run, 8, process)
    for arguments in (["--resume"], ["--resume", "--steps", 9], ["--data", text]):
        line = refused(capsys, "--out", run, *arguments)
        expected = f"{run} is in use by process {process.pid}"
        if "--resume" not in arguments:
            expected = f"--out: {run} already holds a run; --resume goes on with it"
        assert line == f"fastlstm.train: error: {expected}\n"
    sample.main([str(run), "-n", "20"])
    inspect.main([str(run), "--text", str(text), "-n", "50"])
    assert process.poll() is None
    process.kill()  # which leaves no lock behind
    process.communicate()
    reached = load_model(run, "latest")[2]["step"]
    train("--out", run, "--resume", "--steps", reached + 5)
    assert [step for step, *_ in losses(run)] == list(range(1, reached + 6))
    assert not (run / ".pid").exists()


def test_of_two_that_begin_one_run_one_does(tmp_path, text):
    arguments = [*TINY, "--data", text, "--steps", 60]
    processes = [start(*arguments, "--out", tmp_path / "run") for _ in range(2)]
    errors = [(process.communicate()[1], process.returncode) for process in processes]
    assert sorted(code for _, code in errors) == [0, 2]
    for error, code in errors:
        assert code == 0 or "is in use by" in error or "already holds a run" in error
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, 61))


def test_runs_that_begin_at_once_without_a_name_get_folders_of_their_own(tmp_path, text):
    arguments = [*TINY, "--data", text, "--steps", 30]
    processes = [start(*arguments, cwd=tmp_path) for _ in range(3)]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"text-1", "text-2", "text-3"}
    assert all(len(losses(path)) == 30 for path in (tmp_path / "runs").iterdir())


def test_a_mistake_leaves_alone_what_others_put_beside_it(tmp_path, monkeypatch):
    """Folders that were made for a run go with it, where nothing else is in them."""
    held = lock.Claim(tmp_path / "runs" / "mine", new=True)
    lock.Claim(tmp_path / "runs" / "other", new=True).release()
    held.abandon()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    lock.Claim(tmp_path / "a" / "b" / "run", new=True).abandon()
    assert not (tmp_path / "a").exists()

    def full(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(lock, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        lock.Claim(tmp_path / "a" / "run", new=True)
    assert not (tmp_path / "a").exists()


def test_a_file_system_without_locks_is_said(tmp_path, text, capsys, monkeypatch):
    def acquire(self, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", acquire)
    train(*TINY, "--data", text, "--out", tmp_path / "run", "--steps", 2)
    assert "has no locks" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 2


def test_files_have_the_modes_that_the_umask_gives(tmp_path, text):
    run = tmp_path / "run"
    process = start(*TINY, "--data", text, "--out", run, "--steps", 4, "--sample-every", 2,
                    code="import os; os.umask(0o027)")  # fmt: skip
    _, error = process.communicate()
    assert process.returncode == 0, error
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}
    assert run / "checkpoints" / "best" / "training.safetensors" in modes


READ = """
import os, sys
from pathlib import Path
from fastlstm.text import UserError, opening
from fastlstm.text.training import run
if os.getuid() == 0:  # who may read everything
    os.setuid(65534)
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        if name == "config.json":
            run.Run(Path(folder), None).read_config()
        else:
            opening.load_model(Path(folder), "latest")
        print(f"{name} was read", end="\\0")
    except UserError as error:
        print(error, end="\\0")
"""


def test_what_may_not_be_read_is_said_to_be_that(stopped):
    """One process reads all of them: importing torch takes longer than reading."""
    latest = Path("checkpoints", "latest")
    names = [latest / "model.safetensors", latest / "meta.json", latest, "checkpoints"]
    with tempfile.TemporaryDirectory() as above:  # others may look into it, unlike tmp_path
        Path(above).chmod(0o755)
        closed = []
        for j, name in enumerate([*names, "config.json"]):
            run = shutil.copytree(stopped, Path(above) / f"run-{j}")
            (run / name).chmod(0)
            closed.append((run, name))
        process = fork_server.run("-c", READ, *(x for pair in closed for x in pair), cwd=ROOT)
        assert process.returncode == 0, process.stderr
        for run, name in closed:
            (run / name).chmod(0o700)
    *errors, _ = process.stdout.split("\0")
    for (run, name), error in zip(closed, errors, strict=True):
        assert "cannot read " in error
        assert str(run / name) in error
        assert "Permission denied" in error
        assert "damaged" not in error


def pipe(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


def test_a_run_on_standard_input_keeps_its_text(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, steps in ((whole, 12), (parts, 6)):
        pipe(monkeypatch, TEXT)
        train(*TINY, "--data", "-", "--out", run, "--steps", steps)
    command = f"python -m fastlstm.train --out {parts} --resume"
    assert command in capsys.readouterr().out
    assert (parts / "stdin.txt").read_text() == TEXT
    pipe(monkeypatch, "")
    train("--out", parts, "--resume", "--steps", 12)
    assert losses(parts) == losses(whole)
    assert not list(parts.rglob("*.tmp"))


def test_standard_input_is_one_text_of_several(tmp_path, text, monkeypatch):
    pipe(monkeypatch, "from a pipe\n")
    train(*TINY, "--data", "-", text, "--out", tmp_path / "run", "--steps", 3)
    assert (tmp_path / "run" / "stdin.txt").read_text() == "from a pipe\n"
    train("--out", tmp_path / "run", "--resume", "--steps", 5)
    assert len(losses(tmp_path / "run")) == 5


def test_a_run_whose_text_is_lost_takes_it_once_more(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    pipe(monkeypatch, TEXT)
    train(*TINY, "--data", "-", "--out", run, "--steps", 3)
    (run / "stdin.txt").unlink()
    before = contents(run)
    line = refused(capsys, "--out", run, "--resume", "--steps", 5)
    assert f"{run / 'stdin.txt'} is not there; give the same text once more with --data -" in line
    pipe(monkeypatch, TEXT + "more")
    assert "the text is not the one" in refused(capsys, "--out", run, "--resume", "--data", "-")
    assert contents(run) == before
    pipe(monkeypatch, TEXT)
    train("--out", run, "--resume", "--steps", 5, "--data", "-")
    train("--out", run, "--resume", "--steps", 7)
    assert len(losses(run)) == 7


def test_a_terminal_is_told_how_to_end_the_text(tmp_path):
    ours, theirs = pty.openpty()
    process = start(*TINY, "--data", "-", "--out", tmp_path / "run", "--steps", 2, stdin=theirs)
    os.close(theirs)
    line = process.stderr.readline()
    assert line == "reading the text from standard input; end it with Ctrl-D\n"
    os.write(ours, ("never a dull line\n" * 60).encode() + b"\x04")
    _, error = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, error
    assert (tmp_path / "run" / "stdin.txt").read_text() == "never a dull line\n" * 60


def test_a_terminal_that_closes_costs_no_step(tmp_path, text):
    """Every write to it raises from then on, and every step of this run writes."""
    run = tmp_path / "run"
    options = ("--out", run, "--steps", 10**6, "--sample-every", 1, "--eval-every", 10**6)
    pid, ours = pty.fork()
    if pid == 0:
        try:
            code = "import sys; from fastlstm.train import main; main(sys.argv[1:])"
            command = [sys.executable, "-c", code, *TINY, "--data", text, *options]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            os.execve(command[0], [str(word) for word in command], environment)
        finally:
            os._exit(1)  # never the tests a second time
    shown = b""
    while shown.count(b"-" * 72) < 8:
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, shown
    steps = len(losses(run))
    assert steps >= 4
    assert load_model(run, "latest")[2]["step"] == steps


def test_a_closed_standard_input_is_one_line(stopped, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refused(capsys, "--data", "-", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for command, arguments in ((sample, ["--score", "-"]), (inspect, ["--text", "-"])):
        with pytest.raises(SystemExit):
            command.main([str(stopped), *arguments])
        assert f"{arguments[0]} -: standard input is closed" in capsys.readouterr().err


def test_a_length_that_lies_behind_the_run_is_refused(stopped, tmp_path, text, capsys):
    before = contents(stopped)
    line = refused(capsys, "--out", stopped, "--resume", "--steps", 5)
    assert f"--steps 5: {stopped} has already taken 6 steps" in line
    assert contents(stopped) == before
    epochs = tmp_path / "epochs"
    train(*TINY, "--data", text, "--out", epochs, "--epochs", 2, "--batch-size", 40)
    steps = len(losses(epochs))
    line = refused(capsys, "--out", epochs, "--resume", "--epochs", 1)
    assert f"--epochs 1 ({steps // 2} steps): {epochs} has already taken {steps} steps" in line


def test_resuming_says_from_where_and_when_there_is_nothing_to_do(stopped, capsys):
    config = (stopped / "config.json").read_bytes()
    for arguments in ([], ["--steps", 6, "--lr", 1e-5]):
        capsys.readouterr()
        train("--out", stopped, "--resume", *arguments)
        assert "\nstep 6 of 6: nothing to do\n" in capsys.readouterr().out
        assert (stopped / "config.json").read_bytes() == config
    train("--out", stopped, "--resume", "--steps", 9)
    assert "\ngoes on from step 6 of 9\n" in capsys.readouterr().out
    assert len(losses(stopped)) == 9


def fill(path):
    """Have the next one who writes there meet a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["report.html", "loss.png", "metrics.jsonl"])
def test_a_full_disk_names_the_file_and_the_way_on(stopped, name, capsys, monkeypatch):
    real = records.Records.keep_until

    def keep_until(self, step):
        real(self, step)
        if self.path.name == name:
            fill(self.path)

    if name == "metrics.jsonl":
        before = (stopped / name).read_bytes()
        monkeypatch.setattr(records.Records, "keep_until", keep_until)
    else:
        fill(stopped / f"{name}.tmp")
    command = f"python -m fastlstm.train --out {stopped} --resume"
    line = refused(capsys, "--out", stopped, "--resume", "--steps", 9)
    assert f"cannot write {stopped / name}: No space left on device; " in line
    assert line.endswith(f"keeps its last checkpoint, go on with: {command}\n")
    assert not list(stopped.rglob("*.tmp"))
    assert load_model(stopped, "latest")[2]["step"] >= 6
    if name == "metrics.jsonl":
        monkeypatch.undo()
        (stopped / name).unlink()
        (stopped / name).write_bytes(before)
    train("--out", stopped, "--resume", "--steps", 9)
    assert len(losses(stopped)) == 9


def limit(size):
    """Code that has the system refuse files beyond so many bytes."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(stopped):
    """The pages are smaller than the optimizer's state, and fit."""
    before = contents(stopped / "checkpoints")
    assert (stopped / "checkpoints" / "latest" / "training.safetensors").stat().st_size > 99_000
    process = start("--out", stopped, "--resume", "--steps", 9, code=limit(99_000))
    _, error = process.communicate()
    assert process.returncode == 2
    line = error.splitlines()[-1]
    assert f"fastlstm.train: error: cannot write {stopped / 'checkpoints'}" in line
    assert "File too large" in line
    assert line.endswith(f"go on with: python -m fastlstm.train --out {stopped} --resume")
    assert contents(stopped / "checkpoints") == before
    train("--out", stopped, "--resume", "--steps", 9)
    assert len(losses(stopped)) == 9


def test_standard_input_that_does_not_fit_leaves_nothing(tmp_path):
    process = start("--data", "-", "--out", tmp_path / "run", code=limit(999),
                    stdin=subprocess.PIPE)  # fmt: skip
    _, error = process.communicate(TEXT)
    assert process.returncode == 2
    assert "--data -: cannot keep standard input in " in error
    assert "File too large" in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_be_written_says_so(tmp_path, text, capsys, monkeypatch):
    def denied(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", self.lock_file)

    train(*TINY, "--data", text, "--out", tmp_path / "run", "--steps", 2)
    monkeypatch.setattr(lock.FileLock, "acquire", denied)
    line = refused(capsys, "--out", tmp_path / "run", "--resume")
    assert f"cannot write to {tmp_path / 'run'}: Permission denied" in line


def test_names_of_any_bytes_do_not_stop_a_run(tmp_path, text):
    """Linux takes every byte in a name, and old archives have names in Latin-1."""
    odd = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    shutil.copy(text, odd)
    train(*TINY, "--data", os.fsdecode(odd), "--out", tmp_path / "run", "--steps", 2)
    train("--out", tmp_path / "run", "--resume", "--steps", 4)
    assert len(losses(tmp_path / "run")) == 4
    assert "caf?.txt" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_text_that_is_gone_or_changed_is_said_with_the_way_on(stopped, text, capsys):
    config = json.loads((stopped / "config.json").read_text())
    config["data"] = [str(stopped / "moved")]
    (stopped / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "--out", stopped, "--resume", "--steps", 9)
    assert line.endswith("; if the run's text has moved, --data says where to\n")
    (stopped / "moved").write_text("another text\n" * 60)
    line = refused(capsys, "--out", stopped, "--resume", "--steps", 9)
    assert line.endswith(f"begin a new run: --init-from {stopped}\n")
    train("--out", stopped, "--resume", "--steps", 9, "--data", text)
    assert len(losses(stopped)) == 9
