"""Everything before the first step: the text, the model, the run's folder, and the whole team."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import UserError, checkpoint, model
from ..alphabet import Alphabet
from ..data import corpus
from ..data.corpus import Corpus, Streams
from ..model import CharModel, as_state, states
from ..opening import load_model
from ..pages.report import Snapshot
from ..sampling import sample_text
from . import options, precision
from .options import Config, Request
from .run import Progress, Run, claim_folder, generator_name
from .team import Team

EVAL_STREAMS = 64  # many, so that evaluating is fast
EVAL_CHARACTERS = 1 << 17  # spread over the whole held-out tail; more would cost minutes of a run
RESTART_SECONDS = 60.0  # that torchrun's earlier processes may take to end
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Job:
    """All that the training loop works on."""

    config: Config
    run: Run
    team: Team
    streams: dict[str, Streams]
    device: torch.device
    model: CharModel
    forward: Callable[..., Any]  # the model, compiled or spread over the team if so asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meta: dict[str, Any]  # of its checkpoints: alphabet and architecture
    progress: Progress
    total: int  # steps
    resumed: bool
    hx: Any = None  # the state carried from the window before
    rate: float = 0.0  # characters a second

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.meta["unit"], self.meta["vocabulary"])

    @property
    def ended(self) -> bool:
        """Whether the run is as long as asked, or no longer gets better."""
        stale = 0 < self.config.patience <= self.progress.worse
        return stale or self.progress.step >= self.total

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"python -m fastlstm.train --out {shlex.quote(str(self.run.folder))} --resume"

    def save(self, *names: str) -> None:
        """Write checkpoints: rank 0 does, of what it gathers from the whole team."""
        training = checkpoint.optimizer_tensors(self.optimizer)
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        for kind, generator in generators.items():
            for rank, state in enumerate(self.team.gather(generator)):
                training[generator_name(kind, rank)] = state
        for j, x in enumerate(states(self.hx)):
            training[f"state.{j}"] = torch.cat(self.team.gather(x), dim=1)
        if self.run.writes:
            self.progress.scaler = self.scaler.state_dict() or None
            meta = {**self.meta, **asdict(self.progress)}
            self.run.save(list(names), self.model, training, meta)

    def autocast(self) -> torch.autocast:
        """bf16 and fp16: the multiplications in half precision, weights and optimizer in fp32."""
        low = LOW.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=low, enabled=low is not None)

    def evaluate(self, name: str) -> float:
        """Mean loss in nats over a split."""
        with self.autocast():
            sums = self.team.numbers(*model.evaluate(self.model, self.streams[name], self.device))
        return sum(nats for nats, _ in sums) / sum(count for _, count in sums)

    def sample(self, length: int) -> str:
        """What the model writes now; it goes to samples.jsonl as well."""
        text = sample_text(self.model, self.alphabet, length, self.config.seed)
        self.run.samples.append({"step": self.progress.step, "text": text})
        return text

    def snapshot(self, status: str) -> Snapshot:
        """For the report."""
        p = self.progress
        run = shlex.quote(str(self.run.folder))
        return Snapshot(
            name=self.run.folder.name,
            status=status,
            step=p.step,
            total=self.total,
            epoch=p.epoch + p.position / self.streams["train"].windows,
            seconds=p.seconds,
            rate=self.rate,
            best=p.best,
            settings={**asdict(self.config), "processes": self.team.size,
                      "parameters": sum(x.numel() for x in self.model.parameters()),
                      "characters": self.streams["train"].corpus.data.size,
                      "different characters": len(self.streams["train"].corpus.occurring)},
            commands=[("Draw text from it:", f"python -m fastlstm.sample {run} -n 1000"),
                      ("Train it longer:", f"{self.resume_command} --steps {2 * self.total}"),
                      ("Look into its cells:",
                       f"python -m fastlstm.inspect {run} --text FILE")],
        )  # fmt: skip


def make_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    decay: dict[str, Any] = {}
    if config.weight_decay is not None:
        decay["weight_decay"] = config.weight_decay
    if config.optimizer == "rmsprop":  # char-rnn's decay
        return torch.optim.RMSprop(model.parameters(), lr=config.lr, alpha=0.95, **decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr, fused=True, **decay)


def pick_device(name: str, precision: str, local: int = 0) -> torch.device:
    """The device of that name; of several GPUs, a team's each take their own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local:
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # a device may be named and still not be there
    except Exception as error:  # torch raises many kinds here
        raise UserError(f"--device: {name} is not available here") from error
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise UserError(f"--precision {precision} needs a GPU; a CPU has fp32 and bf16")
    return device


def split(corpus: Corpus, config: Config, explicit: set[str], team: Team) -> dict[str, Streams]:
    """Training, validation and test streams; a default batch shrinks to fit a short text.

    Raises:
        UserError: there is too little text for one batch, or for a part that was asked for, or
            the team cannot share a batch evenly.
    """
    size, steps, share = len(corpus.data), config.seq_length, (team.rank, team.size)
    val, test = int(size * config.val_fraction), int(size * config.test_fraction)
    train = size - val - test
    if "batch_size" not in explicit:
        fitting = min(config.batch_size, (train - 1) // steps)
        config.batch_size = max(1, fitting // team.size) * team.size
    if config.batch_size % team.size:
        raise UserError(
            f"--batch-size {config.batch_size}: {team.size} processes cannot share it evenly"
        )
    streams = {"train": Streams(corpus, 0, train, config.batch_size, steps, False, *share)}
    if streams["train"].windows == 0:
        raise UserError(
            f"the text is shorter than one batch: {config.batch_size} streams of {steps} "
            f"characters need {config.batch_size * steps + 1} {config.unit}s to train on, "
            f"there are {train}"
        )
    for name, begin, length in (("val", train, val), ("test", train + val, test)):
        if length < 2:
            if f"{name}_fraction" in explicit and getattr(config, f"{name}_fraction") > 0:
                raise UserError(
                    f"--{name}-fraction leaves {length} {config.unit}s of the text: too few"
                )
            continue
        batch = max(1, min(EVAL_STREAMS, (length - 1) // steps))
        streams[name] = Streams(corpus, begin, begin + length, batch, steps, True, *share)
    if "val" in streams:
        few = max(1, EVAL_CHARACTERS // (streams["val"].batch * steps))
        streams["val"].windows = min(streams["val"].windows, few)
    return streams


def spread(net: CharModel, config: Config, team: Team) -> Callable[..., Any]:
    """What to call in training: the model, compiled and with its gradients averaged if so asked."""
    forward: Any = net
    if config.compile:
        forward = torch.compile(forward)
    if team.size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    return forward


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


def prepare(argv: Sequence[str] | None) -> Job:
    """A job that is ready for its next step, and its folder on the disk, held by this process.

    Raises:
        UserError: something was asked for that cannot be.
    """
    request, team = options.parse(argv, torch.cuda.is_available()), Team.of_environment()
    device = pick_device(request.config.device, request.config.precision, team.local)
    if team.size > 1 and "-" in request.config.data:
        raise UserError("--data -: several processes cannot share standard input")
    team = team.join(device)
    run = choose_run(request, team)
    try:
        return prepare_run(run, request, team, device)
    except BaseException:
        run.abandon()
        raise


def prepare_run(run: Run, request: Request, team: Team, device: torch.device) -> Job:
    """The rest of :func:`prepare`, once there is a folder."""
    out, config, explicit, sha256 = run.folder, request.config, request.explicit, None
    if request.resume:
        stored, sha256 = run.read_config()
        config = options.resumed(request, stored, f"{out}/config.json")
        explicit = explicit | {"batch_size"}  # whatever it was shrunk to then
        device = pick_device(config.device, config.precision, team.local)
    other = None
    if request.init_from:
        other, their_meta = architecture_of(request.init_from, config, explicit)
    if config.precision == "auto":  # one choice for the team, whose machines may differ
        config.precision = team.broadcast(precision.choose(config.cell, device))
    name = corpus.slug(config.data)
    run.title = f"{name}: {config.num_layers}x{config.hidden_size} {config.cell}"
    if "-" in request.config.data:
        run.stdin.receive()
    elif "-" in config.data:
        run.stdin.require()
    text = corpus.load(config.data, config.unit, run.stdin.path)
    if sha256 not in (None, text.sha256):
        raise UserError(f"--resume: the text is not the one that {out} was trained on")
    streams = split(text, config, explicit, team)
    seen = set(text.occurring)
    if request.resume:
        _, their_meta = checkpoint.load_meta(out / "checkpoints" / "latest")
        if their_meta["vocabulary"] == text.occurring:  # as in checkpoints of older versions
            text.read_as(text.occurring)
        seen = set(model.seen_of(their_meta))
    elif other is not None:
        seen |= set(model.seen_of(their_meta))
    meta: dict[str, Any] = {
        "unit": config.unit,
        "vocabulary": text.vocabulary,
        "seen": sorted(seen),
        "model": {name: getattr(config, name) for name in model.ARCHITECTURE},
    }
    torch.manual_seed(config.seed)
    try:
        net = CharModel(len(text.vocabulary), **meta["model"]).to(device)
    except RuntimeError as error:  # whatever torch says when memory runs out
        raise UserError(f"the model does not fit: {str(error).splitlines()[0]}") from error
    model.predict_frequencies(net, text.counts(streams["train"].end))
    if other is not None:
        model.adopt(
            net, text.vocabulary, other, their_meta["vocabulary"], model.seen_of(their_meta)
        )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer, progress = make_optimizer(config, net), Progress()
    if team.rank:  # each process draws its own dropout
        torch.manual_seed((config.seed + (team.rank << 32)) % 2**63)
    hx: list[Tensor] = []
    if request.resume:
        hx, their_meta = run.restore(net, optimizer, config.batch_size, meta, team.rank)
        hx = [x[:, streams["train"].rows].contiguous() for x in hx]
        try:
            progress = Progress.read(their_meta, streams["train"].windows)
            if progress.scaler:
                scaler.load_state_dict(progress.scaler)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the checkpoint latest of {out} is damaged: {error}") from error
    lengths = [config.steps, config.epochs and config.epochs * streams["train"].windows]
    total = min((n for n in lengths if n), default=2**63 - 1)
    if request.resume and progress.step > total:
        length = f"--steps {config.steps}"
        if total != config.steps:
            length = f"--epochs {config.epochs} ({total:,} steps)"
        raise UserError(
            f"{length}: {out} has already taken {progress.step:,} steps; expected a length beyond "
            "them, which counts from the run's beginning"
        )
    forward = spread(net, config, team)
    job = Job(config, run, team, streams, device, net, forward, optimizer, scaler, meta,
              progress, total, request.resume, as_state(hx))  # fmt: skip
    if run.writes:
        run.stdin.keep()
    if not run.writes:
        if not request.resume:
            job.save()
    elif request.resume:
        run.keep_until(progress.step)
        if not job.ended:
            run.write_config(config, text.sha256)
    else:
        run.begin(config, text.sha256, lambda: job.save("latest"))
    return job


def architecture_of(
    name: str, config: Config, explicit: set[str]
) -> tuple[CharModel, dict[str, Any]]:
    """Another run's model and ``meta``; ``config`` takes its architecture.

    Raises:
        UserError: there is no such run, or it disagrees with an option that was given.
    """
    other, _, meta = load_model(Path(name), "best")
    theirs = {"unit": meta["unit"], **meta["model"]}
    for key in ("unit", "cell", "hidden_size", "num_layers"):
        mine, wanted = getattr(config, key), theirs[key]
        same = mine == wanted or {mine, wanted} <= {"lstm", "torch-lstm"}  # the same weights
        if key in explicit and not same:
            raise UserError(f"--init-from: {name} has {key} {wanted}")
        if not (key in explicit and same):
            setattr(config, key, wanted)
    return other, meta


def is_compilers(error: BaseException) -> bool:
    """Whether torch.compile raised it."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
