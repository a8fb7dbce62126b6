"""Sample text from a run, or score a text: ``python -m fastlstm.sample RUN``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .text import UserError, cli
from .text.stdin import standard_input


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = cli.Parser(prog="python -m fastlstm.sample", description="Sample text from a trained run.")
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made")
    p.add_argument("-n", "--length", type=int, default=500, metavar="N",
                   help="characters to draw; bytes, but for --unit char (500)")  # fmt: skip
    p.add_argument("-t", "--temperature", type=float, default=0.8,
                   help="below 1 safer, above 1 wilder, 0 always the likeliest (0.8)")  # fmt: skip
    p.add_argument("-p", "--primer", default="", help="text to go on from (none)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest characters")
    p.add_argument("--top-p", type=float, metavar="P",
                   help="draw from the likeliest of total probability P")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    p.add_argument("--stop", metavar="STR", help="end before this string")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="number of samples (1)")
    p.add_argument("--weights", choices=["fp32", "bf16", "int8"], default="fp32",
                   help="how weights are stored; bf16 and int8 are faster (fp32)")  # fmt: skip
    p.add_argument("--checkpoint", default="best", metavar="NAME",
                   help="best, latest or epoch-N (best, else latest)")  # fmt: skip
    p.add_argument(
        "--score", metavar="FILE", help="print the loss on this text instead; - reads it"
    )
    return p


def check(a: argparse.Namespace) -> None:
    """Raise UserError for a value that its flag does not take."""
    rules = (
        ("-n", a.length, a.length >= 1, "at least 1"),
        ("-t", a.temperature, 0 <= a.temperature < math.inf, "a number that is not negative"),
        ("--top-k", a.top_k, a.top_k is None or a.top_k >= 1, "at least 1"),
        ("--top-p", a.top_p, a.top_p is None or 0 < a.top_p <= 1, "a number in (0, 1]"),
        ("--seed", a.seed, 0 <= a.seed < 2**63, "a number from 0 to 2^63 - 1"),
        ("--batch", a.batch, a.batch >= 1, "at least 1"),
        ("--stop", repr(a.stop), a.stop != "", "a string that is not empty"),
    )
    for flag, value, valid, expected in rules:
        if not valid:
            raise UserError(f"{flag}: expected {expected}, got {value}")


def read_text(name: str) -> bytes:
    """A file's bytes, or standard input's for ``-``; UserError where they cannot be read."""
    try:
        return standard_input("--score -").read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--score: cannot read {name}: {error.strerror}") from error


def sample(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    from .drawing import Draw
    from .text.alphabet import Alphabet, Decoder
    from .text.run import load_model
    from .text.sampling import rounded_model, score, stream

    a = parser().parse_args(argv)
    check(a)
    model, vocabulary, meta = load_model(Path(a.run), a.checkpoint)
    alphabet = Alphabet(meta["unit"], vocabulary)
    if a.score is not None:
        text, unknown = alphabet.encode(read_text(a.score))
        if len(text) < 2:
            known = " that the model knows" if unknown else ""
            raise UserError(f"--score: {a.score} holds less than two characters{known}")
        cli.note_unknown("fastlstm.sample", "--score", unknown, alphabet.unit)
        nats = score(rounded_model(model, a.weights), text)
        print(
            f"{nats:.4f} nats a character, {nats / math.log(2):.4f} bits, "
            f"perplexity {math.exp(min(nats, 700)):.3f}"
        )
        return 0
    # Bytes that the shell passed on undecoded go back to what they were.
    primer = a.primer.encode("utf-8", errors="surrogateescape")
    prime, unknown = alphabet.encode(primer)
    cli.note_unknown("fastlstm.sample", "-p", unknown, alphabet.unit)
    prime = (prime if len(prime) else alphabet.start()).expand(-1, a.batch)
    how = Draw(a.temperature, a.top_k, a.top_p, torch.tensor([a.seed]))
    chunks = stream(model, prime, a.length, how, weights=a.weights)
    if a.batch > 1:
        for j, column in enumerate(torch.cat(list(chunks)).t().tolist()):
            found = Decoder(a.stop).feed(alphabet.decode(column), final=True)
            print(f"--- {j + 1} ---\n{primer.decode(errors='replace')}{found}")
        return 0
    print(primer.decode(errors="replace"), end="", flush=True)
    decoder = Decoder(a.stop)
    for tokens in chunks:
        drawn = decoder.feed(alphabet.decode(tokens[:, 0].tolist()))
        print(drawn, end="", flush=True)
        if decoder.ended:
            break
    print(decoder.feed(b"", final=True))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.sample", lambda: sample(argv))


if __name__ == "__main__":
    main()
