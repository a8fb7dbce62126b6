"""See what a run's cells do on a text: ``python -m fastlstm.inspect RUN --text FILE``.

After Karpathy, Johnson and Li, "Visualizing and Understanding Recurrent Networks" (2015).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torch import Tensor

from .text import UserError, cli
from .text.data.stdin import standard_input

if TYPE_CHECKING:
    import numpy as np

    from .text.alphabet import Alphabet, Tokens

LENGTH = 20_000  # characters that statistics are made of
SHOWN = 5_000  # of these characters in the page; VALUES bounds its size
VALUES = 6_000_000  # of cells and gates


def parser() -> cli.Parser:
    """The command's flags."""
    p = cli.Parser(
        "inspect",
        description="Have a trained run read a text, and write an HTML page: the text coloured by "
        "its surprise or by any cell or gate, what the model expected next, all cells as small "
        "pictures, those that learned to follow something, and how saturated gates are.",
    )
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made, or one of "
                   "its checkpoints' folders")  # fmt: skip
    p.add_argument("--text", required=True, metavar="FILE", help="the text to read; - reads it")
    p.add_argument("--out", metavar="PAGE.html", help="the page (default: RUN/inspect.html)")
    p.add_argument("-n", "--length", type=int, default=LENGTH,
                   help=f"characters to read, for the statistics ({LENGTH:,})")  # fmt: skip
    p.add_argument("--shown", type=int, default=SHOWN, metavar="N",
                   help=f"of them in the page ({SHOWN:,}, less of a large model)")  # fmt: skip
    p.add_argument("--checkpoint", metavar="NAME",
                   help="best, latest or epoch-N (best, else latest)")  # fmt: skip
    return p


def beginning(file: BinaryIO, size: int) -> Iterator[bytes]:
    """At most so many bytes, in pieces, for a file's ``read`` takes memory for as many as asked."""
    while size and (piece := file.read(min(size, 1 << 20))):
        size -= len(piece)
        yield piece


def read_text(name: str, length: int) -> bytes:
    """The beginning of a text: as many bytes as ``length`` characters can have."""
    try:
        with nullcontext(standard_input("--text -")) if name == "-" else open(name, "rb") as file:
            return b"".join(beginning(file, 4 * length))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--text: cannot read {name}: {reason}") from error


@dataclass
class Text:
    """What the model reads.

    Attributes:
        pieces: its characters or tokens, as a page shows them.
        indices: int64 ``(T, 1)``, of the vocabulary: one or more of them a piece.
        starts, ends: of every piece, the places of its first and its last index.
    """

    pieces: list[str]
    indices: Tensor
    starts: np.ndarray
    ends: np.ndarray


def known_text(name: str, length: int, alphabet: Alphabet) -> Text:
    """The beginning of a text, without what the model does not know.

    Raises:
        UserError: it cannot be read, or less than two characters are left.
    """
    import numpy as np

    from .text.alphabet import Tokens

    if isinstance(alphabet, Tokens):
        return text_of_tokens(name, length, alphabet)
    # To a byte model a byte that is no UTF-8 is a character too.
    errors = "surrogateescape" if alphabet.unit == "byte" else "replace"
    text = read_text(name, length).decode("utf-8", errors)[:length]
    known = {c: alphabet.knows(c.encode("utf-8", errors)) for c in set(text)}
    unknown = sum(not known[c] for c in text)
    text = "".join(c for c in text if known[c])
    if len(text) < 2:
        which = " that the model knows" if unknown else ""
        raise UserError(f"--text: {name} holds less than two characters{which}")
    cli.note_unknown("fastlstm.inspect", "--text", unknown, "character")
    parts = [c.encode("utf-8", errors) for c in text]
    indices, _ = alphabet.encode(b"".join(parts))
    sizes = np.array([len(part) if alphabet.unit == "byte" else 1 for part in parts])
    ends = np.cumsum(sizes) - 1
    if alphabet.unit == "byte":
        text = re.sub("[\udc80-\udcff]", "\ufffd", text)
    return Text(list(text), indices, ends - sizes + 1, ends)


def text_of_tokens(name: str, length: int, alphabet: Tokens) -> Text:
    """The beginning of a text in tokens; those that share a character make one piece.

    Raises:
        UserError: it cannot be read, or is less than two pieces long.
    """
    import codecs

    import numpy as np

    beginning = read_text(name, length).decode("utf-8", "surrogateescape")[:length]
    indices, _ = alphabet.encode(beginning.encode("utf-8", "surrogateescape"))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, ends, text, last = [], [], "", len(indices) - 1
    for place, token in enumerate(indices[:, 0].tolist()):
        text += decoder.decode(alphabet.decode([token]), place == last)
        if place == last or not decoder.getstate()[0]:
            pieces.append(text)
            ends.append(place)
            text = ""
    if len(pieces) < 2:
        raise UserError(f"--text: {name} holds less than two tokens")
    starts = np.array([0, *ends[:-1]]) + np.arange(len(ends)).clip(max=1)
    return Text(pieces, indices, starts, np.array(ends))


def inspect(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    import numpy as np

    from .text import probe
    from .text.alphabet import UNITS, Alphabet
    from .text.files import write_text
    from .text.opening import open_model
    from .text.pages.heatmap import View, cell_name, heatmap

    a = parser().parse_args(argv)
    if a.length < 2:
        raise UserError(f"-n: expected at least 2, got {a.length}")
    if a.shown < 1:
        raise UserError(f"--shown: expected at least 1, got {a.shown}")
    run, model, _, meta = open_model(a.run, a.checkpoint)
    out = Path(a.out) if a.out else run / "inspect.html"
    alphabet = Alphabet.of(meta)
    tokens = UNITS[alphabet.unit].in_bytes
    text = known_text(a.text, a.length, alphabet)
    size, characters = len(text.pieces), "".join(text.pieces)
    after = np.cumsum([len(piece) for piece in text.pieces]) - 1  # what each piece ends with
    units = model.rnn.num_layers * model.rnn.hidden_size
    pictures = {"LSTM": 4, "GRU": 3}.get(model.rnn.mode, 1)  # of a unit: its cell and its gates
    shown = min(size, a.shown, max(1, VALUES // (units * pictures)))
    # A character is read when its last byte is, or a token of several.
    ends = text.ends
    reading = probe.read(model, text.indices, keep=int(ends[shown - 1]) + 1)

    def states(reading: probe.Reading) -> np.ndarray:
        return reading.cells.numpy()[ends].reshape(size, units)

    cells = states(reading)
    rolls = probe.rolled(cells, characters, after)
    of_untrained = [probe.ranking(states(probe.read(other, text.indices)), characters, ends=after)
                    for other in probe.untrained(model, meta["model"])]  # fmt: skip
    found = probe.ranking(cells, characters, ends=after)
    rank, others = probe.standing_out(found, of_untrained, size, rolls)
    assert reading.likeliest is not None
    assert reading.probabilities is not None
    last = ends[:shown]
    page = heatmap(
        View(
            name=run.resolve().name,
            text="standard input" if a.text == "-" else a.text,
            model=f"{model.rnn.num_layers}x{model.rnn.hidden_size} {meta['model']['cell']}, "
            f"step {meta['step']:,}",
            length=size,
            nats=reading.loss,
            bits_each=alphabet.bits_a_byte(reading.loss, text.indices[1:]) if tokens else (
                reading.loss / np.log(2)),
            pieces=text.pieces[:shown],
            cells=reading.cells.numpy()[last],
            gates={gate: values.numpy()[last] for gate, values in reading.gates.items()},
            bits=np.add.reduceat(reading.bits, text.starts)[:shown],
            likeliest=reading.likeliest.numpy()[last],
            probabilities=reading.probabilities.numpy()[last],
            came=text.indices.numpy()[text.starts[:shown], 0],
            alphabet=alphabet,
            ranking=rank,
            others=others,
            rolls=rolls,
            fresh=probe.best_of(of_untrained),
            closed={gate: part.numpy() for gate, part in reading.closed.items()},
            open={gate: part.numpy() for gate, part in reading.open.items()},
        )
    )  # fmt: skip
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    width = model.rnn.hidden_size
    for what, best in rank:
        closest = "; ".join(f"{cell_name(j, width)} ({r:+.2f})" for j, r in best[:3])
        share = probe.by_chance(rolls[what], best[0][1])
        print(f"{what}: {closest}; as close by chance in {share:.2%} of {size:,} rolls")
    if others:
        print(f"no cell stands out from those of an untrained model or from chance: "
              f"{', '.join(others)}")  # fmt: skip
    print(f"page: {out.resolve().as_uri()}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.inspect", lambda: inspect(argv))


if __name__ == "__main__":
    main()
