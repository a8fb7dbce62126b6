"""A vocabulary of tokens, learned from the part of a text to train on, and the text in tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import numpy as np

from .. import UserError
from ..alphabet import WORDS, Tokens, parts_of
from .corpus import PIECE, Corpus, spooled


def require() -> None:
    """Raise UserError where the package that learns a vocabulary is missing."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError(
            "--unit bpe: tokenizers, which learns its vocabulary, is not installed: "
            "pip install 'fastlstm[bpe]'"
        ) from None


def learn(text: np.ndarray, size: int) -> Tokens:
    """The alphabet of at most so many tokens that byte-level BPE learns from bytes."""
    require()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, show_progress=False,
        initial_alphabet=[chr(value) for value in range(256)],  # a character stands for each byte
    )  # fmt: skip
    parts = parts_of(_pieces(text))
    tokenizer.train_from_iterator((part.decode("latin-1") for part in parts), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Tokens.learned([[model["vocab"][token] for token in pair] for pair in model["merges"]])


def tokenized(
    text: Corpus, fractions: tuple[float, float], size: int, tokens: Tokens | None = None
) -> Corpus:
    """A text of bytes as one of tokens, its parts to train, validate and test on as before.

    Args:
        fractions: of the bytes to validate on and to test on, at the end.
        size: at most, of a vocabulary to learn.
        tokens: those to use; by default they are learned from the part to train on.
    """
    tails = text.tails(*fractions)
    cuts = [0, len(text.data) - sum(tails), len(text.data) - tails[1], len(text.data)]
    sections = [text.data[begin:end] for begin, end in itertools.pairwise(cuts)]
    alphabet = tokens or learn(sections[0], size)
    seen, lengths = np.zeros(len(alphabet.vocabulary), dtype=bool), [0] * len(sections)

    def numbers() -> Iterator[np.ndarray]:
        for section, part in enumerate(sections):
            for words in parts_of(_pieces(part)):
                values = np.array(alphabet.numbers(words), dtype=np.uint16)
                seen[values] = True
                lengths[section] += len(values)
                yield values

    data = spooled(numbers())
    return Corpus(data, np.flatnonzero(seen).tolist(), text.sha256, text.summary, alphabet,
                  (lengths[1], lengths[2]))  # fmt: skip


def _pieces(text: np.ndarray) -> Iterator[bytes]:
    return (text[begin : begin + PIECE].tobytes() for begin in range(0, len(text), PIECE))
