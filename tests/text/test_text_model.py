"""A run as a Python object: it samples, scores and predicts as the commands do, and is saved."""

import json
import math
import os
import shutil
from pathlib import Path

import fork_server
import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file

import fastlstm
from fastlstm.sample import main as sample
from fastlstm.text import TextModel, UserError, load
from fastlstm.train import main as train

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = "the cat sat on the mat; é à\n"
SMALL = ["--hidden-size", "16", "--batch-size", "4", "--seq-length", "8", "--lr", "1e-2",
         "--sample-every", "0", "--device", "cpu", "--precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="module", params=["byte", "char"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text(LINE * 60, encoding="utf-8")
    train([*SMALL, "--data", str(folder / "text"), "--out", str(folder / "run"), "--steps", "60",
           "--unit", request.param])  # fmt: skip
    return folder / "run"


def printed(capsys, *arguments):
    capsys.readouterr()
    sample([str(a) for a in arguments])
    return capsys.readouterr().out


def test_import_fastlstm_is_enough(run):
    """Without ``import fastlstm.text``, which the page does not ask for."""
    code = "import sys, fastlstm; print(fastlstm.text.load(sys.argv[1]).sample(5), end='')"
    process = fork_server.run("-c", code, run, cwd=Path(fastlstm.__file__).parents[1])
    assert (process.returncode, process.stdout) == (0, load(run).sample(5)), process.stderr


def test_a_sample_is_the_commands(run, capsys):
    model = load(run)
    for flags, values in (
        ([], {}),
        (["-n", 40, "-t", 1.5, "--seed", 3], {"length": 40, "temperature": 1.5, "seed": 3}),
        (["-p", "the c", "-t", 0, "--stop", ";"],
         {"primer": "the c", "temperature": 0, "stop": ";"}),
        (["--top-k", 3, "--top-p", 0.9, "--weights", "int8"],
         {"top_k": 3, "top_p": 0.9, "weights": "int8"}),
    ):  # fmt: skip
        assert model.sample(**values) + "\n" == printed(capsys, run, *flags)
    assert model.sample(30, primer=b"the c") == model.sample(30, primer="the c")


def test_a_score_is_the_commands_and_that_of_the_logits(run, tmp_path, capsys):
    (tmp_path / "other").write_text(LINE[3:] * 3, encoding="utf-8")
    model = load(run)
    nats = model.score(LINE[3:] * 3)
    shown = printed(capsys, run, "--score", tmp_path / "other")
    assert shown.startswith(f"{nats:.4f} nats a character, {nats / math.log(2):.4f} bits")
    indices, _ = model.alphabet.encode((LINE[3:] * 3).encode())
    logits = model.logits(LINE[3:] * 3)
    assert logits.shape == (len(indices), len(model.vocabulary))
    loss = torch.nn.functional.cross_entropy(logits[:-1], indices[1:, 0])
    assert nats == pytest.approx(loss.item(), abs=1e-5)


def test_it_knows_its_vocabulary_and_its_history(run):
    model = load(run)
    if model.alphabet.unit == "byte":
        assert model.vocabulary == list(range(256))
    else:
        assert "".join(map(chr, model.vocabulary)) == "".join(sorted(set(LINE)))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert model.history == [json.loads(line) for line in lines]
    assert [entry["step"] for entry in model.history] == list(range(1, 61))


def test_a_run_that_trains_has_a_history_too(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    whole = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(whole[:-9])  # half of the last line
    assert len(load(copy).history) == 59
    (copy / "metrics.jsonl").write_text("\0\0\n[1]\n" + whole)  # damaged at its beginning
    assert [line["step"] for line in load(copy).history] == list(range(1, 61))
    (copy / "metrics.jsonl").unlink()
    assert load(copy).history == []


def test_any_checkpoint_can_be_loaded(run):
    assert load(run).meta == load(run, "best").meta == load(run / "checkpoints" / "best").meta
    assert load(run, "latest").meta["step"] == 60
    with pytest.raises(UserError, match="has no checkpoint 'epoch-99'; it has best, latest"):
        load(run, "epoch-99")
    with pytest.raises(UserError, match="nowhere is no run"):
        load("nowhere")
    with pytest.raises(UserError, match="device: abacus is not available"):
        load(run, device="abacus")


def test_using_it_leaves_training_mode_and_generators_alone(run):
    model = load(run)
    assert not model.training
    model.train()
    before = torch.get_rng_state()
    model.sample(20), model.score(LINE), model.logits(LINE)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_a_module(run):
    model = load(run)
    indices = torch.randint(len(model.vocabulary), (7, 3))
    logits, state = model(indices)
    beginning, _ = model.model(indices[:4])
    assert torch.equal(logits[:4], beginning)
    assert [x.shape for x in state] == [(2, 3, 16)] * 2
    assert sum(p.numel() for p in model.parameters()) == sum(
        x.numel() for x in load_file(run / "checkpoints" / "best" / "model.safetensors").values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_computes_in_any_dtype(run, tmp_path, dtype):
    model, text = load(run), (LINE * 9).encode()
    other = load(run).to(dtype)
    assert torch.allclose(other.logits(text), model.logits(text), atol=0.1)
    assert other.score(text) == pytest.approx(model.score(text), abs=0.02)
    assert len(other.sample(20)) >= 5
    pytest.importorskip("huggingface_hub")
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        load(tmp_path / "saved").logits(text), load(run).to(dtype).float().logits(text)
    )


def test_unknown_characters_are_skipped_with_a_warning(run):
    model = load(run)
    if model.alphabet.unit == "byte":
        assert model.score("Ω" + LINE) > 0  # a model of bytes knows every text
        return
    with pytest.warns(UserWarning, match="text: the model has never seen 2 characters: skipped"):
        assert model.score("Ω" + LINE + "Ω") == model.score(LINE)
    with pytest.warns(UserWarning, match="primer: the model has never seen 1 character: skipped"):
        assert model.sample(9, primer="Ωthe") == "Ω" + model.sample(9, primer="the")
    with pytest.raises(UserError, match=r"text must hold 1 or more characters .* it holds 0"):
        model.logits("Ω")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "length must be a whole number from 1, got 0"),
        ({"length": 2.5}, "length must be a whole number from 1, got 2.5"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"temperature": -1}, "temperature must be a number that is not negative, got -1"),
        ({"top_k": 0}, "top_k must be a whole number from 1"),
        ({"top_p": 2}, "top_p must be a number in"),
        ({"stop": ""}, "stop must be a string that is not empty"),
        ({"weights": "int4"}, "weights must be 'fp32', 'bf16' or 'int8', got 'int4'"),
        ({"primer": 3}, "primer must be a str or bytes, got int"),
    ],
)
def test_mistakes_name_the_argument(run, values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(run).sample(**values)


def test_too_short_a_text_is_refused(run):
    with pytest.raises(UserError, match=r"text must hold 2 or more characters .* it holds 1"):
        load(run).score("t")
    with pytest.raises(TypeError, match="text must be a str or bytes, got list"):
        load(run).logits(["t"])


@pytest.fixture
def saved(run, tmp_path):
    pytest.importorskip("huggingface_hub")
    load(run).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_is_the_same_model(run, saved, capsys):
    model, reloaded = load(run), TextModel.from_pretrained(saved)
    assert (reloaded.vocabulary, reloaded.history) == (model.vocabulary, model.history)
    assert reloaded.sample(60) == model.sample(60) == load(saved).sample(60)
    assert printed(capsys, saved, "-n", 60) == printed(capsys, run, "-n", 60)
    ours, theirs = (load_file(f / "model.safetensors") for f in (run / "checkpoints/best", saved))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((saved / "config.json").read_text())
    assert (config["cell"], config["hidden_size"], config["num_layers"]) == ("lstm", 16, 2)
    assert "library_name: fastlstm" in (saved / "README.md").read_text()
    assert {p.name for p in saved.iterdir()} == {
        "README.md", "config.json", "metrics.jsonl", "model.safetensors",
    }  # fmt: skip
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1


def test_saving_again_keeps_the_card_and_replaces_the_rest(run, saved):
    (saved / "README.md").write_text("my own words")
    load(run, "latest").save_pretrained(saved)
    assert (saved / "README.md").read_text() == "my own words"
    assert load(saved).meta["step"] == 60


def test_a_run_is_not_saved_over(run):
    pytest.importorskip("huggingface_hub")
    before = (run / "config.json").read_bytes()
    for folder in (run, run / "checkpoints" / "best"):
        with pytest.raises(UserError, match=r"save_directory: .* holds a run or a checkpoint; exp"):
            load(run).save_pretrained(folder)
    assert (run / "config.json").read_bytes() == before


def test_a_save_that_fails_leaves_what_was_there(run, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastlstm.text.pretrained.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        load(run, "latest").save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_pushing_uploads_what_saving_writes(run, saved, monkeypatch):
    """Beside a hub that keeps the files that it gets."""
    hub_mixin = pytest.importorskip("huggingface_hub.hub_mixin")
    uploads = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message, **_):
            uploads[repo_id] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}/{self.token}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    files = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert load(run).push_to_hub("cats", token="t") == "https://hub/me/cats/t"
    assert uploads == {"me/cats": files}
    address = load(run).save_pretrained(saved, push_to_hub=True)
    assert address == "https://hub/me/saved/None"
    assert uploads["me/saved"] == files


def test_a_repositorys_name_is_downloaded(saved, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = TextModel.from_pretrained("me/cats", revision="v1")
    assert model.sample(20) == load(saved).sample(20)
    files = ["config.json", "model.safetensors", "metrics.jsonl"]
    assert asked == [("me/cats", {"revision": "v1", "allow_patterns": files})]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "cannot read .*config.json"),
        (lambda c: "[1]", "describes no model of ours: it lacks 'vocabulary'"),
        (lambda c: c | {"vocabulary": 3}, "lacks 'vocabulary'"),
        (lambda c: c | {"seen": ["a"]}, "'seen' is no list of numbers"),
        (lambda c: c | {"cell": "abacus"}, "describes no model of ours"),
        (lambda c: c | {"hidden_size": None}, "describes no model of ours"),
        (lambda c: c | {"hidden_size": 17}, "does not fit"),
        (lambda c: c | {"hidden_size": 2**60}, "describes too large a model"),
        (lambda c: c | {"step": True}, "lacks 'step'"),
    ],
)
def test_damaged_folders_are_refused(saved, change, message):
    path = saved / "config.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=message):
        TextModel.from_pretrained(saved)


def test_a_saved_model_has_no_checkpoints(saved):
    with pytest.raises(UserError, match=r"checkpoint best: .* holds one model, and no checkpoints"):
        load(saved, "best")


MISSING = """
import sys
import fastlstm
try:
    model = fastlstm.text.load({run!r})
except ImportError as error:
    sys.exit(print(error))
model.sample(5)
for call in (model.save_pretrained, model.push_to_hub, model.from_pretrained):
    try:
        call("x")
    except ImportError as error:
        print(error)
"""
HUB = [f"{name}: huggingface_hub is not installed: pip install 'fastlstm[hub]'"
       for name in ("save_pretrained", "push_to_hub", "from_pretrained")]  # fmt: skip


@pytest.mark.parametrize("run", ["byte"], indirect=True)
@pytest.mark.parametrize(
    ("package", "messages"),
    [
        ("huggingface_hub", HUB),
        ("safetensors",
         ["fastlstm.text: safetensors is not installed: pip install 'fastlstm[text]'"]),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(run, tmp_path, package, messages):
    root = Path(fastlstm.__file__).parents[1]
    code = fork_server.without(package) + MISSING.format(run=str(run))
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = fork_server.run("-W", "ignore", "-c", code, cwd=tmp_path, env=environment)
    assert process.stdout.splitlines() == messages
    assert not list(tmp_path.iterdir())
