"""Several processes train one model: the same run as one process, and one that survives losses."""

import os
import signal
import socket
from pathlib import Path

import fork_server
import pytest

pytest.importorskip("safetensors")

from safetensors.torch import load_file
from trainer import losses, refused, wait_for_step

from fastlstm.train import main

TINY = [
    *("--hidden-size", "16", "--num-layers", "2", "--device", "cpu", "--batch-size", "6"),
    *("--seq-length", "8", "--eval-every", "4", "--sample-every", "6", "--dropout", "0"),
    *("--test-fraction", "0.05", "--clip-norm", "0.5", "--precision", "fp32"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"{j} and {j * 7919 % 97}, the quick brown fox\n" for j in range(60)))
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments, restarts=0):
    """Two processes that torchrun starts, and starts again."""
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "fastlstm.train"),
    ]
    return fork_server.start(*command, *arguments, cwd=ROOT, env=ENVIRONMENT)


def team(*arguments):
    """What two processes print, their errors and their status: as of torchrun, which takes longer
    to begin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        fork_server.start(
            *("-m", "fastlstm.train", *arguments), cwd=ROOT,
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120) for process in processes]
    output, error = map("".join, zip(*printed, strict=True))
    return output, error, max(abs(process.wait()) for process in processes)


def weights(run):
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def assert_close(a, b):
    """The same run but for the order of sums."""
    assert len(losses(a)) == len(losses(b))
    for x, y in zip(losses(a), losses(b), strict=True):
        assert x[:3] == (y[0], y[1], pytest.approx(y[2], abs=1e-4))
        if x[3] and y[3]:  # a run also evaluates where it ends
            assert x[3] == pytest.approx(y[3], abs=1e-4)
    for name, value in weights(a).items():
        assert (value - weights(b)[name]).abs().max() < 1e-3, name


def test_two_processes_make_the_run_of_one(tmp_path, text):
    """And may go on as one; one may go on as two, with the state that it carried."""
    options = [*TINY, "--data", text]
    main([str(a) for a in [*options, "--steps", 26, "--out", tmp_path / "one"]])
    output, error, status = team(*options, "--steps", 18, "--out", tmp_path / "two")
    assert status == 0, error
    assert output.count(f"{tmp_path / 'two'}: 2x16 lstm") == 1  # only rank 0 talks
    assert "cpu, 2 processes" in output
    assert output.count("test: ") == 1
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        ".lock", "about.json",
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "report.html", "samples.jsonl",
    ]  # fmt: skip
    main(["--out", str(tmp_path / "two"), "--resume", "--steps", "22"])
    _, error, status = team("--out", tmp_path / "two", "--resume", "--steps", 26)
    assert status == 0, error
    assert_close(tmp_path / "one", tmp_path / "two")


def workers(process):
    """The process ids of torchrun's children that train."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_lost_process_is_replaced_and_the_run_goes_on_bit_for_bit(tmp_path, text, capsys):
    options = [*TINY, "--data", text, "--dropout", "0.3", "--steps", 120]
    _, error, status = team(*options, "--out", tmp_path / "whole")
    assert status == 0, error
    process = torchrun(*options, "--out", tmp_path / "lost", restarts=1)
    wait_for_step(tmp_path / "lost", 30, process)
    line = refused(capsys, "--out", tmp_path / "lost", "--resume")
    assert f"is in use by process {workers(process)[0]}" in line
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert losses(tmp_path / "whole") == losses(tmp_path / "lost")
    for name, value in weights(tmp_path / "whole").items():
        assert (value == weights(tmp_path / "lost")[name]).all()


def test_mistakes_of_teams(tmp_path, text, capsys, monkeypatch):
    arguments = [*TINY, "--data", text, "--out", tmp_path / "run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "are started by: torchrun" in refused(capsys, *arguments)
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "must be numbers" in refused(capsys, *arguments)
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert "cannot share standard input" in refused(capsys, *TINY, "--data", "-")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared(tmp_path, text):
    _, error, status = team(*TINY, "--data", text, "--out", tmp_path / "run", "--batch-size", 5)
    assert status != 0
    line = "fastlstm.train: error: --batch-size 5: 2 processes cannot share it evenly\n"
    assert error.count(line) == 1
    assert not (tmp_path / "run").exists()
