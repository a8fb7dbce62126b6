"""See what a run's cells do on a text: ``python -m fastlstm.inspect RUN --text FILE``.

After Karpathy, Johnson and Li, "Visualizing and Understanding Recurrent Networks" (2015).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .text import UserError, cli
from .text.data.stdin import standard_input

LENGTH = 20_000  # characters that statistics are made of
SHOWN = 5_000  # of these characters in the page; this and VALUES bound its size
VALUES = 6_000_000


def parser() -> cli.Parser:
    """The command's flags."""
    p = cli.Parser(
        prog="python -m fastlstm.inspect",
        description="Have a trained run read a text, and write an HTML page: the text coloured by "
        "any cell, the cells that learned to follow something in it, and how saturated gates are.",
    )
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made, or one of "
                   "its checkpoints' folders")  # fmt: skip
    p.add_argument("--text", required=True, metavar="FILE", help="the text to read; - reads it")
    p.add_argument("--out", metavar="PAGE.html", help="the page (default: RUN/inspect.html)")
    p.add_argument("-n", "--length", type=int, default=LENGTH,
                   help=f"characters to read ({LENGTH:,}); {SHOWN:,} are shown")  # fmt: skip
    p.add_argument("--checkpoint", metavar="NAME",
                   help="best, latest or epoch-N (best, else latest)")  # fmt: skip
    return p


def read_text(name: str, length: int) -> bytes:
    """The beginning of a text: as many bytes as ``length`` characters can have."""
    try:
        if name == "-":
            return standard_input("--text -").read(4 * length)
        with open(name, "rb") as file:
            return file.read(4 * length)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--text: cannot read {name}: {reason}") from error


def inspect(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    import numpy as np

    from .text import probe
    from .text.alphabet import Alphabet
    from .text.files import write_text
    from .text.opening import open_model
    from .text.pages.heatmap import View, cell_name, heatmap

    a = parser().parse_args(argv)
    if a.length < 2:
        raise UserError(f"-n: expected at least 2, got {a.length}")
    run, model, vocabulary, meta = open_model(a.run, a.checkpoint)
    out = Path(a.out) if a.out else run / "inspect.html"
    # To a byte model a byte that is no UTF-8 is a character too.
    errors = "surrogateescape" if meta["unit"] == "byte" else "replace"
    text = read_text(a.text, a.length).decode("utf-8", errors)[: a.length]
    alphabet = Alphabet(meta["unit"], vocabulary)
    known = {c: alphabet.knows(c.encode("utf-8", errors)) for c in set(text)}
    unknown = sum(not known[c] for c in text)
    text = "".join(c for c in text if known[c])
    if len(text) < 2:
        which = " that the model knows" if unknown else ""
        raise UserError(f"--text: {a.text} holds less than two characters{which}")
    cli.note_unknown("fastlstm.inspect", "--text", unknown, "character")
    parts = [c.encode("utf-8", errors) for c in text]
    indices, _ = alphabet.encode(b"".join(parts))
    # The model has seen a character when it has seen its last byte.
    sizes = [len(part) if meta["unit"] == "byte" else 1 for part in parts]
    ends = np.cumsum(sizes) - 1
    reading = probe.read(model, indices)
    cells = reading.cells.numpy()[ends]
    if meta["unit"] == "byte":
        text = re.sub("[\udc80-\udcff]", "\ufffd", text)
    layers, width = cells.shape[1:]

    def ranked(reading: probe.Reading) -> probe.Ranking:
        return probe.ranking(reading.cells.numpy()[ends].reshape(len(text), -1), text)

    of_untrained = [ranked(probe.read(other, indices))
                    for other in probe.untrained(model, meta["model"])]  # fmt: skip
    rank, others = probe.standing_out(ranked(reading), of_untrained, len(text))
    shown = min(len(text), SHOWN, max(1, VALUES // (layers * width)))
    architecture = meta["model"]
    name = run.resolve().name
    page = heatmap(
        View(
            name, a.text, text[:shown], cells[:shown], rank, others,
            {gate: part.numpy() for gate, part in reading.closed.items()},
            {gate: part.numpy() for gate, part in reading.open.items()},
            f"{architecture['num_layers']}x{architecture['hidden_size']} {architecture['cell']}, "
            f"step {meta['step']:,}. It read {len(text):,} characters of {a.text} with a loss of "
            f"{reading.loss:.3f} nats each; the first {shown:,} are shown. Colours: "
            + ("tanh of the cell." if reading.closed.keys() >= {"forget"} else "hidden state."),
        )
    )  # fmt: skip
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    for what, best in rank:
        closest = "; ".join(f"{cell_name(j, width)} ({r:+.2f})" for j, r in best[:3])
        print(f"{what}: {closest}")
    if others:
        print(f"no cell stands out from those of an untrained model: {', '.join(others)}")
    print(f"page: {out.resolve().as_uri()}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.inspect", lambda: inspect(argv))


if __name__ == "__main__":
    main()
