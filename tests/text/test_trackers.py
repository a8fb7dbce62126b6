"""TensorBoard, Weights & Biases and Trackio get what a run's own files get."""

import sys
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest

pytest.importorskip("safetensors")

from trainer import metrics, refused, train

import fastlstm

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    *("--hidden-size", 16, "--batch-size", 4, "--seq-length", 8, "--eval-every", 4),
    *("--sample-every", 3, "--steps", 6, "--device", "cpu"),
]


def figures(run):
    """A run's own record of each step, by the names that trackers show."""
    names = {"loss/training": "train_loss", "loss/validation": "val_loss", "lr": "lr",
             "gradient_norm": "grad_norm", "chars_per_second": "chars_per_second"}  # fmt: skip
    return {
        line["step"]: {shown: pytest.approx(line[name], rel=1e-3)
                       for shown, name in names.items() if line[name] is not None}
        for line in metrics(run)
    }  # fmt: skip


class Package:
    """What wandb and trackio have in common, in place of either."""

    def __init__(self):
        self.runs = []

    def init(self, **options):
        run = SimpleNamespace(options=options, steps={}, samples={}, finished=False)

        def log(values, step):
            assert not run.finished
            assert step >= max([0, *run.steps, *run.samples])  # neither takes an earlier step
            if "sample" in values:
                run.samples[step] = values["sample"]
            else:
                run.steps[step] = values

        run.log, run.finish = log, lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    fake = Package()
    fake.flag = f"--{request.param}"
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_a_service_gets_every_step_and_every_sample(tmp_path, text, package):
    run = tmp_path / "mine"
    train("--data", text, "--out", run, *TINY, package.flag)
    (logged,) = package.runs
    assert logged.finished
    assert logged.steps == figures(run)
    assert list(logged.samples) == [3, 6]
    assert all(isinstance(text, str) and text for text in logged.samples.values())
    assert logged.options["project"] == "fastlstm"
    assert logged.options["config"]["hidden_size"] == 16
    assert logged.options["name"].startswith("mine")


def test_a_resumed_run_is_the_same_run(tmp_path, text, package):
    run, other = tmp_path / "mine", tmp_path / "elsewhere" / "mine"
    train("--data", text, "--out", run, *TINY, package.flag)
    train("--out", run, "--resume", "--steps", 9)
    train("--data", text, "--out", other, *TINY, package.flag)
    first, resumed, elsewhere = (
        {key: logged.options[key] for key in logged.options if key in ("id", "name")}
        for logged in package.runs
    )
    assert first == resumed != elsewhere  # though the folders' names are alike
    assert package.runs[1].options["resume"] == "allow"
    assert list(package.runs[1].steps) == [7, 8, 9]


def test_an_interrupted_or_diverged_run_is_finished_too(tmp_path, text, package):
    with pytest.raises(SystemExit):
        train("--data", text, "--out", tmp_path / "run", *TINY, package.flag, "--lr", 1e30)
    assert package.runs[0].finished


def test_a_service_that_refuses_is_one_line(tmp_path, text, package, capsys):
    def refuse(**_):
        raise RuntimeError("no key is\nconfigured")

    package.init = refuse
    line = refused(capsys, "--data", text, "--out", tmp_path / "run", *TINY, package.flag)
    assert line == f"fastlstm.train: error: {package.flag}: no key is configured\n"


def test_nothing_is_asked_of_a_tracker_without_its_flag(tmp_path, text, package):
    train("--data", text, "--out", tmp_path / "run", *TINY, f"--no-{package.flag[2:]}")
    assert not package.runs
    assert not (tmp_path / "run" / "tracker-id").exists()


def test_tensorboard_has_every_step_and_every_sample(tmp_path, text):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train("--data", text, "--out", run, *TINY, "--tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    steps = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    assert steps == figures(run)
    assert [event.step for event in events.Tensors("sample/text_summary")] == [3, 6]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_and_leaves_no_folder(tmp_path, text, name):
    code = fork_server.without(name) + "from fastlstm.train import main; main(sys.argv[1:])"
    words = ["-W", "ignore", "-c", code, "--data", text, "--out", tmp_path / "run", *TINY]
    process = fork_server.run(*words, f"--{name}", cwd=Path(fastlstm.__file__).parents[1])
    assert process.returncode == 2
    line = f"fastlstm.train: error: --{name}: not installed: pip install {name}\n"
    assert process.stderr == line
    assert not (tmp_path / "run").exists()
