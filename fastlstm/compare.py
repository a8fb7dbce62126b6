"""Lay runs over each other: ``python -m fastlstm.compare RUN RUN ...``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .text import UserError, cli

if TYPE_CHECKING:
    from .text.pages.comparison import Compared

MOST = 12  # runs that colours, dashes and marks tell apart


def parser() -> cli.Parser:
    """The command's flags."""
    p = cli.Parser(
        "compare",
        description="Write an HTML page that lays runs over each other: their losses by steps, by "
        "time and by what they read, what they ended at, the settings that differ, and their "
        "samples.",
    )
    p.add_argument("runs", metavar="RUN", nargs="+", help="folders that fastlstm.train made")
    p.add_argument("--out", metavar="PAGE.html", default="compare.html",
                   help="the page (compare.html)")  # fmt: skip
    return p


def read_run(folder: Path, label: str) -> Compared:
    """What a run wrote down, whether it has ended or trains right now.

    Raises:
        UserError: it is no run, has taken no step yet, or is damaged.
    """
    import json

    from .text.pages.comparison import Compared
    from .text.training import about
    from .text.training.records import Metrics, Samples

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        metrics = Metrics(folder / "metrics.jsonl", writes=False)
        metrics.look()
        samples = Samples(folder / "samples.jsonl", writes=False)
        if samples.path.exists():
            samples.look()
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise UserError(f"{folder} is no run: it has no {name}") from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from error
    sizes = [config.get(name) for name in ("batch_size", "seq_length")] if (
        isinstance(config, dict)) else [None]  # fmt: skip
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{folder}/config.json is damaged: it lacks the size of a step")
    if not metrics.steps:
        raise UserError(f"{folder} has taken no step yet")
    run = Compared(label, config, metrics, samples.entries, about.read(folder / about.NAME))
    if run.unit == "bpe" and run.bytes_each is None:
        raise UserError(f"{folder}/{about.NAME} does not say how many bytes the run's tokens have")
    return run


def compare(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    from .text.files import write_text
    from .text.pages.comparison import page, summary

    a = parser().parse_args(argv)
    folders = [Path(name) for name in a.runs]
    for folder, name in zip(folders, a.runs, strict=True):
        if [f.resolve() for f in folders].count(folder.resolve()) > 1:
            raise UserError(f"RUN: {name} is given more than once")
    if not 2 <= len(folders) <= MOST:
        raise UserError(f"RUN: expected 2 to {MOST} runs to compare, got {len(folders)}")
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else a.runs
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    out = Path(a.out)
    try:
        write_text(out, page(runs))
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    print(summary(runs))
    print(f"page: {out.resolve().as_uri()}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.compare", lambda: compare(argv))


if __name__ == "__main__":
    main()
