"""Sample text from a run, or score a text: ``python -m fastlstm.sample RUN``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .text import UserError, cli
from .text.data.stdin import standard_input

if TYPE_CHECKING:
    from .generation.draw import Draw
    from .text.alphabet import Alphabet
    from .text.model import CharModel

TOGETHER = 256  # samples that are drawn at a time


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = cli.Parser(prog="python -m fastlstm.sample", description="Sample text from a trained run.")
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made, or one of "
                   "its checkpoints' folders")  # fmt: skip
    p.add_argument("-n", "--length", type=int, default=500, metavar="N",
                   help="characters to draw; bytes, but for --unit char (500)")  # fmt: skip
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
    from tqdm import tqdm

    from .generation.draw import Draw
    from .text.alphabet import Alphabet, Decoder
    from .text.opening import open_model
    from .text.sampling import rounded_model, score, stream
    from .text.training.job import pick_device

    a = parser().parse_args(argv)
    check(a)
    device = pick_device(a.device, "fp32")
    _, model, vocabulary, meta = open_model(a.run, a.checkpoint)
    model = model.to(device)
    alphabet = Alphabet(meta["unit"], vocabulary)
    if a.score is not None:
        text, unknown = alphabet.encode(read_text("--score", a.score))
        if len(text) < 2:
            known = " that the model knows" if unknown else ""
            raise UserError(f"--score: {a.score} holds less than two characters{known}")
        cli.note_unknown("fastlstm.sample", "--score", unknown, alphabet.unit)
        nats = score(rounded_model(model, a.weights), text.to(device))
        perplexity = math.exp(min(nats, 700))
        print(
            f"{nats:.4f} nats a character, {nats / math.log(2):.4f} bits, "
            f"perplexity {perplexity:{'.3f' if perplexity < 1e6 else '.4g'}}"
        )
        return 0
    # Bytes that the shell passed on undecoded go back to what they were.
    primer = a.primer.encode("utf-8", errors="surrogateescape")
    if a.primer == "-":
        primer = read_text("-p", "-")
    prime, unknown = alphabet.encode(primer)
    cli.note_unknown("fastlstm.sample", "-p", unknown, alphabet.unit)
    prime = (prime if len(prime) else alphabet.start()).to(device)
    draw = Draw(a.temperature, a.top_k, a.top_p, torch.tensor([a.seed]))
    if a.batch > 1:
        for number, drawn in enumerate(samples(model, alphabet, prime, draw, a), 1):
            tqdm.write(f"--- {number} ---\n{primer.decode(errors='replace')}{drawn}")
        return 0
    chunks = stream(model, prime, a.length, draw, weights=a.weights)
    print(primer.decode(errors="replace"), end="", flush=True)
    decoder = Decoder(a.stop)
    for tokens in chunks:
        drawn = decoder.feed(alphabet.decode(tokens[:, 0].tolist()))
        print(drawn, end="", flush=True)
        if decoder.ended:
            break
    print(decoder.feed(b"", final=True))
    return 0


def samples(
    model: CharModel, alphabet: Alphabet, prime: Tensor, draw: Draw, a: argparse.Namespace
) -> Iterator[str]:
    """Draw ``a.batch`` texts, some at a time, so that the first come soon and memory holds them."""
    from tqdm import tqdm

    from .text.alphabet import Decoder
    from .text.sampling import stream

    with tqdm(total=a.batch * a.length, desc="drawing", unit="char", unit_scale=True,
              leave=False, disable=None) as bar:  # fmt: skip
        for first in range(0, a.batch, TOGETHER):
            count = min(TOGETHER, a.batch - first)
            seed = torch.tensor([(a.seed + (first // TOGETHER << 32)) % 2**63])
            tokens = []
            for chunk in stream(model, prime.expand(-1, count), a.length,
                                draw._replace(seed=seed), weights=a.weights):  # fmt: skip
                tokens.append(chunk)
                bar.update(chunk.numel())
            for column in torch.cat(tokens).t().tolist():
                yield Decoder(a.stop).feed(alphabet.decode(column), final=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises SystemExit with its status where that is not 0."""
    cli.run("fastlstm.sample", lambda: sample(argv))


if __name__ == "__main__":
    main()
