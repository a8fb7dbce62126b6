"""Sample text from a run, or score a text: ``python -m fastlstm.sample RUN``."""

from __future__ import annotations

import argparse
import codecs
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .text import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastlstm.sample", description=__doc__)
    p.add_argument("run", metavar="RUN", help="a folder that fastlstm.train made")
    p.add_argument("-n", "--length", type=int, default=500, help="characters to draw (500)")
    p.add_argument("-t", "--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    p.add_argument("-p", "--primer", default="\n", help="what comes before (a newline)")
    p.add_argument("--top-k", type=int, help="draw from the K most likely characters")
    p.add_argument("--top-p", type=float, help="draw from the likeliest of total probability P")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    p.add_argument("--stop", metavar="STR", help="end before this string")
    p.add_argument("--batch", type=int, default=1, help="number of samples (1)")
    p.add_argument("--weights", choices=["fp32", "bf16", "int8"], default="fp32")
    p.add_argument("--checkpoint", default="best", help="best, latest or epoch-N (best)")
    p.add_argument("--score", metavar="FILE", help="print the loss on this text instead")
    return p


def check(a: argparse.Namespace) -> None:
    def refuse(flag: str, expected: str, got: object) -> None:
        raise UserError(f"{flag}: expected {expected}, got {got}")

    if a.length < 1:
        refuse("-n", "at least 1", a.length)
    if not (a.temperature >= 0 and math.isfinite(a.temperature)):
        refuse("-t", "a number that is not negative", a.temperature)
    if a.top_k is not None and a.top_k < 1:
        refuse("--top-k", "at least 1", a.top_k)
    if a.top_p is not None and not 0 < a.top_p <= 1:
        refuse("--top-p", "a number in (0, 1]", a.top_p)
    if a.batch < 1:
        refuse("--batch", "at least 1", a.batch)
    if a.stop == "":
        refuse("--stop", "a string", "an empty one")
    if a.primer == "":
        refuse("-p", "at least one character", "none")
    if a.weights == "int8":
        raise UserError("--weights int8 is not available yet; fp32 and bf16 are")


class Printer:
    """Bytes to text on standard output as they come, up to a stop string."""

    def __init__(self, stop: str | None) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop, self.held, self.ended = stop, "", False

    def write(self, data: bytes, final: bool = False) -> None:
        self.held += self.decoder.decode(data, final)
        if self.stop and self.stop in self.held:
            self.held, self.ended, final = self.held.split(self.stop)[0], True, True
        # What could be the beginning of the stop string waits.
        keep = 0 if final or not self.stop else len(self.stop) - 1
        out = self.held[: len(self.held) - keep]
        self.held = self.held[len(out) :]
        sys.stdout.write(out)
        sys.stdout.flush()


def run(a: argparse.Namespace) -> None:
    from .text.run import load_model
    from .text.sampling import draw, encode, score

    check(a)
    model, vocabulary, _ = load_model(Path(a.run), a.checkpoint)
    if a.weights == "bf16":
        model = model.to(torch.bfloat16)
    if a.score is not None:
        try:
            text = Path(a.score).read_bytes()
        except OSError as error:
            raise UserError(f"--score: cannot read {a.score}: {error.strerror}") from error
        if len(text) < 2:
            raise UserError(f"--score: {a.score} is shorter than two characters")
        nats = score(model, encode(text, vocabulary))
        print(
            f"{nats:.4f} nats a character, {nats / math.log(2):.4f} bits, "
            f"perplexity {math.exp(nats):.3f}"
        )
        return
    primer = a.primer.encode()
    prime = encode(primer, vocabulary).repeat(1, a.batch)
    generator = torch.Generator().manual_seed(a.seed)
    tokens = draw(
        model, prime, a.length, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p,
        generator=generator,
    )  # fmt: skip
    shown = "" if a.primer == "\n" else a.primer
    if a.batch == 1:
        sys.stdout.write(shown)
        printer = Printer(a.stop)
        for token in tokens:
            printer.write(bytes([vocabulary[int(token)]]))
            if printer.ended:
                break
        else:
            printer.write(b"", final=True)
        print()
        return
    for j, column in enumerate(torch.stack(list(tokens), dim=1).tolist()):
        print(f"--- {j + 1} ---")
        sys.stdout.write(shown)
        printer = Printer(a.stop)
        printer.write(bytes(vocabulary[t] for t in column), final=True)
        print()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"fastlstm.sample: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
