"""Sample text from a run, or score a text: ``python -m fastlstm.sample RUN``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .text import UserError, cli
from .text.data.stdin import standard_input

if TYPE_CHECKING:
    from .text.alphabet import Alphabet
    from .text.model import CharModel


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = cli.Parser("sample", description="Draw text from a trained run, or score a text.")
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made, or one of "
                   "its checkpoints' folders")  # fmt: skip
    p.add_argument("-n", "--length", type=int, default=500, metavar="N",
                   help="characters to draw; of a model of bytes or tokens, so many of "
                   "these (500)")  # fmt: skip
    p.add_argument("-t", "--temperature", type=float, default=0.8,
                   help="below 1 safer, above 1 wilder, 0 always the likeliest (0.8)")  # fmt: skip
    p.add_argument("-p", "--primer", default="", help="text to go on from; - reads it (none)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest characters")
    p.add_argument("--top-p", type=float, metavar="P",
                   help="draw from the likeliest of total probability P")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    p.add_argument("--stop", metavar="STR", help="end before this string")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="number of samples (1)")
    p.add_argument("--weights", choices=["fp32", "bf16", "int8"], default="fp32",
                   help="how weights are stored; bf16 and int8 are faster (fp32)")  # fmt: skip
    p.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, auto (cpu)")
    p.add_argument("--checkpoint", metavar="NAME",
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


def read_text(flag: str, name: str) -> bytes:
    """A file's bytes, or standard input's for ``-``; UserError where they cannot be read."""
    try:
        return standard_input(f"{flag} -").read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{flag}: cannot read {name}: {error.strerror}") from error


def sample(argv: Sequence[str] | None) -> int:
    """Run the command and return its exit status."""
    from .text.alphabet import Alphabet
    from .text.devices import pick_device
    from .text.opening import open_model

    a = parser().parse_args(argv)
    check(a)
    device = pick_device(a.device)
    _, model, _, meta = open_model(a.run, a.checkpoint)
    command = print_score if a.score is not None else print_samples
    command(model.to(device), Alphabet.of(meta), device, a)
    return 0


def print_score(
    model: CharModel, alphabet: Alphabet, device: torch.device, a: argparse.Namespace
) -> None:
    """Print the loss on a text."""
    from .text.alphabet import UNITS
    from .text.sampling import rounded_model, score

    text, unknown = alphabet.encode(read_text("--score", a.score))
    if len(text) < 2:
        known = " that the model knows" if unknown else ""
        raise UserError(
            f"--score: {a.score} holds less than two {UNITS[alphabet.unit].each}s{known}"
        )
    cli.note_unknown("fastlstm.sample", "--score", unknown, alphabet.unit)
    nats = score(rounded_model(model, a.weights), text.to(device))
    perplexity = math.exp(min(nats, 700))
    unit, bits = UNITS[alphabet.unit], f"{nats / math.log(2):.4f} bits"
    if unit.in_bytes:
        bits = f"{alphabet.bits_a_byte(nats, text[1:]):.4f} bits a byte"
    print(
        f"{nats:.4f} nats a {unit.each}, {bits}, "
        f"perplexity {perplexity:{'.3f' if perplexity < 1e6 else '.4g'}}{unit.per}"
    )


def print_samples(
    model: CharModel, alphabet: Alphabet, device: torch.device, a: argparse.Namespace
) -> None:
    """Print the primer and what the model writes after it, piece by piece."""
    from .generation.draw import Draw
    from .text.sampling import draw_texts, stream_text

    # Bytes that the shell passed on undecoded go back to what they were.
    primer = a.primer.encode("utf-8", errors="surrogateescape")
    if a.primer == "-":
        primer = read_text("-p", "-")
    prime, unknown = alphabet.prime(primer)
    cli.note_unknown("fastlstm.sample", "-p", unknown, alphabet.unit)
    shown = primer.decode(errors="replace")
    draw = Draw(a.temperature, a.top_k, a.top_p, torch.tensor([a.seed]))
    how = {"weights": a.weights, "stop": a.stop}
    drawing = (model, alphabet, prime.to(device), a.length, draw)
    if a.batch > 1:
        texts = partial(draw_texts, *drawing, a.batch, **how)
        print_texts(texts, shown, a, "token" if alphabet.unit == "bpe" else "char")
        return
    print(shown, end="", flush=True)
    for piece in stream_text(*drawing, **how):
        print(piece, end="", flush=True)
    print()


def print_texts(
    texts: Callable[..., Iterator[str]], primer: str, a: argparse.Namespace, unit: str
) -> None:
    """Print ``a.batch`` texts as they come, under a bar of the characters that were drawn."""
    from tqdm import tqdm

    with tqdm(total=a.batch * a.length, desc="drawing", unit=unit, unit_scale=True,
              leave=False, disable=None) as bar:  # fmt: skip
        for number, text in enumerate(texts(drawn=bar.update), 1):
            tqdm.write(f"--- {number} ---\n{primer}{text}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.sample", lambda: sample(argv))


if __name__ == "__main__":
    main()
