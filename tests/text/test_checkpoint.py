"""Checkpoints: whole at any moment, and refused when they are not ours."""

import errno
import json
import os
import sys

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import save_file

from fastlstm.text import UserError, checkpoint, files, model, opening

META = {"format": 1, "position": 0, "epoch": 0, "unit": "byte", "vocabulary": [10, 97],
        "model": {"cell": "lstm", "hidden_size": 3, "num_layers": 1, "dropout": 0.0}}  # fmt: skip


def save(folder, step):
    tensors = {"x": torch.full((7,), float(step))}
    checkpoint.save(folder, tensors, tensors, {**META, "step": step})


def stored_step(folder):
    """The step of a checkpoint, all three of whose files must agree on it."""
    place, meta = checkpoint.load_meta(folder)
    steps = {meta["step"]}
    for name in ("model", "training"):
        steps |= set(checkpoint.load_tensors(place, name)["x"].tolist())
    assert len(steps) == 1
    return steps.pop()


def die_at(event, folder, step):
    """Save in a forked process that ends at its n-th touch of the file system; whether it did."""
    child = os.fork()
    if child == 0:
        left = event

        def hook(name, _):
            nonlocal left
            if name == "open" or name.split(".")[0] in ("os", "shutil", "ctypes"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            save(folder, step)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_at_any_moment_of_a_save_a_whole_checkpoint_is_left(
    tmp_path, monkeypatch, can_exchange
):
    if not can_exchange:
        monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    seen = set()
    for event in range(200):
        folder = tmp_path / str(event) / "latest"
        save(folder, 1)
        died = die_at(event, folder, 2)
        seen.add(stored_step(folder))
        assert checkpoint.names(folder.parent) == ["latest"]
        save(folder, 3)
        assert stored_step(folder) == 3
        assert [p.name for p in folder.parent.iterdir()] == ["latest"]
        if not died:
            break
    assert not died
    assert event > 10
    assert seen == {1, 2}


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "latest"
    save(folder, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save(folder, 2)
    assert error.value.filename == str(folder)
    assert stored_step(folder) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_write_text_leaves_the_old_text_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_text(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.write_text(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_goes_on_as_if_not_stored(kind):
    def steps(net, optimizer, number):
        for j in range(number):
            optimizer.zero_grad()
            (net(torch.full((2, 3), j + 1.0)).square().sum()).backward()
            optimizer.step()

    nets = [torch.nn.Linear(3, 2) for _ in range(2)]
    optimizers = [kind(net.parameters(), lr=0.1) for net in nets]
    steps(nets[0], optimizers[0], 3)
    nets[1].load_state_dict(nets[0].state_dict())
    tensors = checkpoint.optimizer_tensors(optimizers[0])
    checkpoint.restore_optimizer(optimizers[1], tensors)
    for net, optimizer in zip(nets, optimizers, strict=True):
        steps(net, optimizer, 3)
    assert torch.equal(nets[0].weight, nets[1].weight)

    for damage in (
        {"optimizer.0.step": torch.zeros(3)},
        {"optimizer.1.exp_avg_sqrt": torch.zeros(2)},
        {"optimizer.2.step": torch.zeros(())},
        {"optimizer.x.step": torch.zeros(())},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            checkpoint.restore_optimizer(optimizers[1], {**tensors, **damage})


@pytest.fixture
def trained(tmp_path):
    """A run's folder with a checkpoint of a tiny untrained model."""
    net = model.CharModel(2, "lstm", 3, 1, 0.0)
    checkpoint.save(tmp_path / "checkpoints" / "latest", net.state_dict(), {}, {**META, "step": 0})
    return tmp_path


def test_a_run_without_a_best_checkpoint_gives_its_latest(trained):
    net, vocabulary, meta = opening.load_model(trained, "best")
    assert (vocabulary, meta["step"], net.training) == ([10, 97], 0, False)


def change_meta(folder, **values):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **values}))


def architecture(**values):
    return {"model": {**META["model"], **values}}


DAMAGES = {
    "no meta": lambda f: (f / "meta.json").unlink(),
    "no JSON": lambda f: (f / "meta.json").write_text("{"),
    "binary meta": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "list": lambda f: (f / "meta.json").write_text("[1]"),
    "nested": lambda f: (f / "meta.json").write_text("[" * 100_000),
    "step": lambda f: change_meta(f, step="many"),
    "true step": lambda f: change_meta(f, step=True),
    "format": lambda f: change_meta(f, format=2),
    "vocabulary": lambda f: change_meta(f, vocabulary=["a", "b"]),
    "large vocabulary": lambda f: change_meta(f, vocabulary=[10, 256]),
    "unsorted vocabulary": lambda f: change_meta(f, vocabulary=[97, 10]),
    "other vocabulary": lambda f: change_meta(f, vocabulary=[10, 97, 98]),
    "seen": lambda f: change_meta(f, seen=[[10]]),
    "cell": lambda f: change_meta(f, **architecture(cell="abacus")),
    "size": lambda f: change_meta(f, **architecture(hidden_size=4)),
    "huge size": lambda f: change_meta(f, **architecture(hidden_size=10**9)),
    "no size": lambda f: change_meta(f, **architecture(hidden_size=None)),
    "negative size": lambda f: change_meta(f, **architecture(hidden_size=-3)),
    "many layers": lambda f: change_meta(f, **architecture(num_layers=10**9)),
    "dropout": lambda f: change_meta(f, **architecture(dropout=1.5)),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "cut weights": lambda f: os.truncate(f / "model.safetensors", 400),
    "pickle": lambda f: torch.save({"x": torch.zeros(1)}, f / "model.safetensors"),
    "foreign": lambda f: save_file({"x": torch.zeros(3)}, f / "model.safetensors"),
    "half": lambda f: save_file(
        {k: v.half() for k, v in model.CharModel(2, "lstm", 3, 1, 0.0).state_dict().items()},
        f / "model.safetensors",
    ),
    "nan": lambda f: save_file(
        {k: v * torch.nan for k, v in model.CharModel(2, "lstm", 3, 1, 0.0).state_dict().items()},
        f / "model.safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_checkpoints_are_refused(trained, name):
    opening.load_model(trained, "latest")
    DAMAGES[name](trained / "checkpoints" / "latest")
    with pytest.raises(UserError, match=r"the checkpoint .*latest"):
        opening.load_model(trained, "latest")
