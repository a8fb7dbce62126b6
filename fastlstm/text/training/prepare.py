"""Everything before the first step: the text, the model, the run's folder, and the whole team."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import UserError, checkpoint
from ..alphabet import UNITS, Alphabet, Tokens
from ..data import corpus, tokenized
from ..data.corpus import Corpus, Streams
from ..devices import pick_device
from ..model import ARCHITECTURE, CharModel, adopt, as_state, seen_of
from ..opening import open_model
from ..pages.scale import NATS, Scale, bits_a_byte
from . import about, options, precision, trackers
from .job import Job
from .network import make_model, make_optimizer, spread
from .options import VOCABULARY, Config, Request
from .run import Progress, Run, claim_folder
from .splits import split
from .team import Team

RESTART_SECONDS = 60.0  # that torchrun's earlier processes may take to end


@dataclass(frozen=True)
class Start:
    """What the weights of a run begin with.

    Attributes:
        meta: of the checkpoint that they come from; None where they are random.
        model: of the other run that they come from, or None.
    """

    meta: dict[str, Any] | None = None
    model: CharModel | None = None

    @property
    def seen(self) -> list[int]:
        """The characters that the weights were trained on."""
        return [] if self.meta is None else seen_of(self.meta)

    @property
    def tokens(self) -> Tokens | None:
        """What the weights count in, where it is tokens."""
        alphabet = None if self.meta is None else Alphabet.of(self.meta)
        return alphabet if isinstance(alphabet, Tokens) else None


def prepare(argv: Sequence[str] | None) -> Job:
    """A job that is ready for its next step, and its folder on the disk, held by this process.

    Raises:
        UserError: something was asked for that cannot be.
    """
    request, team = options.parse(argv, torch.cuda.is_available()), Team.of_environment()
    device = pick_device(request.config.device, request.config.precision, team.local)
    if team.size > 1 and "-" in request.config.data:
        raise UserError("--data -: several processes cannot share standard input")
    trackers.modules(request.config)  # one that is missing should leave no folder behind
    if request.config.unit == "bpe" and not (request.resume or request.init_from or team.restarts):
        tokenized.require()
    team = team.join(device)
    run = choose_run(request, team)
    try:
        job = prepare_run(run, request, team, device)
        job.about = about.record(job, argv)
        return job
    except BaseException:
        run.abandon()
        raise


def prepare_run(run: Run, request: Request, team: Team, device: torch.device) -> Job:
    """The rest of :func:`prepare`, once there is a folder."""
    config, sha256 = request.config, None
    if request.resume:
        config, sha256 = stored_config(run, request)
        device = pick_device(config.device, config.precision, team.local)
    start = find_start(run, request, config)
    if config.precision == "auto":  # one choice for the team, whose machines may differ
        config.precision = team.broadcast(precision.choose(config.cell, device))
    text = read_text(run, request, config, sha256, start)
    if request.resume and start.meta and start.meta["vocabulary"] == text.occurring:
        text.read_as(text.occurring)  # as in checkpoints of older versions
    streams = split(text, config, request.explicit, team)
    run.scale = scale_of(config, streams)
    meta = describe(config, text, start)
    model = make_model(config, meta, text.counts(streams["train"].end), device)
    if start.model is not None and start.meta is not None:
        adopt(model, text.vocabulary, start.model, start.meta["vocabulary"], start.seen)
    job = Job(
        config, run, team, streams, device, model, model, make_optimizer(config, model),
        torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), meta, Progress(),
        total_steps(config, streams["train"].windows), request.resume,
    )  # fmt: skip
    if team.rank:  # each process draws its own dropout
        torch.manual_seed((config.seed + (team.rank << 32)) % 2**63)
    if request.resume:
        restore(job)
    job.forward = spread(model, config, team)
    write_first_files(job, text.sha256)
    return job


def stored_config(run: Run, request: Request) -> tuple[Config, str]:
    """The config of the run to resume, with what may change of it, and its text's checksum."""
    stored, sha256 = run.read_config()
    config = options.resumed(request, stored, f"{run.folder}/config.json")
    request.explicit.add("batch_size")  # whatever it was shrunk to then
    return config, sha256


def find_start(run: Run, request: Request, config: Config) -> Start:
    """Where the weights come from; ``config`` takes the architecture of another run."""
    if request.resume:
        place, meta = checkpoint.load_meta(run.folder / "checkpoints" / "latest")
        if meta["unit"] == "bpe" and not Alphabet.valid(meta):  # the text is read by it
            raise UserError(f"the checkpoint {place} is damaged: it holds no vocabulary of tokens")
        return Start(meta)
    if request.init_from:
        other, meta = architecture_of(request.init_from, config, request.explicit)
        return Start(meta, other)
    return Start()


def read_text(
    run: Run, request: Request, config: Config, sha256: str | None, start: Start
) -> Corpus:
    """The text; what comes from standard input is kept in the run's folder.

    In tokens it is read by the vocabulary of the weights that the run begins with, or by a new one.

    Raises:
        UserError: it cannot be read, or has another checksum than the run to resume.
    """
    run.title = (
        f"{corpus.slug(config.data)}: {config.num_layers}x{config.hidden_size} {config.cell}"
    )
    if "-" in request.config.data:
        run.stdin.receive()
    elif "-" in config.data:
        run.stdin.require()
    unit = "byte" if config.unit == "bpe" else config.unit
    text = load_text(run, request, config, unit)
    if sha256 not in (None, text.sha256):
        raise UserError(
            f"--resume: the text is not the one that {run.folder} was trained on (now "
            f"{text.summary}); to go on with another, begin a new run: "
            f"--init-from {shlex.quote(str(run.folder))}"
        )
    if config.unit != "bpe":
        return text
    size, fractions = config.vocabulary or VOCABULARY, (config.val_fraction, config.test_fraction)
    return tokenized.tokenized(text, fractions, size, start.tokens)


def load_text(run: Run, request: Request, config: Config, unit: str) -> Corpus:
    """The text as bytes or code points; of a run that goes on, an error says how to name another.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return corpus.load(config.data, unit, run.stdin.path)
    except UserError as error:
        if not request.resume or "data" in request.explicit:
            raise
        raise UserError(f"{error}; if the run's text has moved, --data says where to") from error


def scale_of(config: Config, streams: dict[str, Streams]) -> Scale:
    """What the run's losses are shown in."""
    unit, train = UNITS[config.unit], streams["train"]
    if not unit.in_bytes:
        return NATS
    return bits_a_byte(unit.each, train.bytes_each, streams.get("val", train).bytes_each)


def describe(config: Config, text: Corpus, start: Start) -> dict[str, Any]:
    """What the run's checkpoints say of its model."""
    return {
        **text.alphabet.described(),
        "seen": sorted({*text.occurring, *start.seen} & set(text.vocabulary)),
        "model": {name: getattr(config, name) for name in ARCHITECTURE},
    }


def total_steps(config: Config, windows: int) -> int:
    """The run's length, of ``windows`` steps an epoch."""
    lengths = [config.steps, config.epochs and config.epochs * windows]
    return min((n for n in lengths if n), default=2**63 - 1)


def restore(job: Job) -> None:
    """Have the job go on from its run's ``latest``.

    Raises:
        UserError: it is damaged, or the run is longer than asked already.
    """
    config, folder, data = job.config, job.run.folder, job.streams["train"]
    state, meta = job.run.restore(job.model, job.optimizer, config.batch_size, job.meta,
                                  job.team.rank)  # fmt: skip
    job.hx = as_state([x[:, data.rows].contiguous() for x in state])
    try:
        job.progress = Progress.read(meta, data.windows)
        if job.progress.scaler:
            job.scaler.load_state_dict(job.progress.scaler)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint latest of {folder} is damaged: {error}") from error
    if job.progress.step > job.total:
        length = f"--steps {config.steps}"
        if job.total != config.steps:
            length = f"--epochs {config.epochs} ({job.total:,} steps)"
        raise UserError(
            f"{length}: {folder} has already taken {job.progress.step:,} steps; expected a length "
            "beyond them, which counts from the run's beginning"
        )


def write_first_files(job: Job, sha256: str) -> None:
    """Make the folder a run, or one that goes on; the whole team takes part."""
    run = job.run
    if not run.writes:
        if not job.resumed:
            job.save()
        return
    run.stdin.keep()
    if job.resumed:
        run.keep_until(job.progress.step)
        if not job.ended:
            run.write_config(job.config, sha256)
    else:
        run.begin(job.config, sha256, lambda: job.save("latest"))


def choose_run(request: Request, team: Team) -> Run:
    """The run, the same for the whole team, whose rank 0 holds its folder.

    A restarted team goes on with it, and waits for what is left of the one before.
    """
    if team.restarts and request.out is None:
        raise UserError("--out: a run that torchrun may start again needs a folder with a name")
    claim, choice = None, ""
    if team.rank == 0:
        restarted = team.restarts > 0 and (Path(request.out or "") / "config.json").exists()
        resume, name = request.resume or restarted, corpus.slug(request.config.data)
        claim = claim_folder(request.out, name, resume, RESTART_SECONDS if team.restarts else 0.0)
        choice = f"{int(resume)}{claim.folder}"
    choice = team.broadcast(choice)
    if choice[0] == "1":
        request.resume, request.init_from = True, None
    return Run(Path(choice[1:]), claim)


def architecture_of(
    name: str, config: Config, explicit: set[str]
) -> tuple[CharModel, dict[str, Any]]:
    """Another run's model and ``meta``; ``config`` takes its architecture.

    Raises:
        UserError: there is no such run, or it disagrees with an option that was given.
    """
    _, other, _, meta = open_model(name, None)
    tokens = len(meta["vocabulary"]) if meta["unit"] == "bpe" else None
    theirs = {"unit": meta["unit"], "vocabulary": tokens, **meta["model"]}
    for key in ("unit", "vocabulary", "cell", "hidden_size", "num_layers"):
        mine, wanted = getattr(config, key), theirs[key]
        same = mine == wanted or {mine, wanted} <= {"lstm", "torch-lstm"}  # the same weights
        if key in explicit and not same:
            has = f"no {key}" if wanted is None else f"{key} {wanted}"
            raise UserError(f"--init-from: {name} has {has}")
        if not (key in explicit and same):
            setattr(config, key, wanted)
    return other, meta
