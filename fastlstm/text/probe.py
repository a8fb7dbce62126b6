"""What the cells of a model do as it reads a text, after Karpathy, Johnson and Li (2015)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import stack_of
from ..ops import forward_and_saved
from .model import CharModel, as_state, states

WINDOW = 1000  # characters read at a time
LOW, HIGH = 0.1, 0.9  # a gate beyond these is saturated, as in the paper
LIKELIEST = 5  # characters that could come next
CHANCE = 0.02  # of all rolls, the part that may do as well as a cell that is named
UNTRAINED = 3  # models that a trained one is compared with; each reads the text once more

# Properties, each with cells and their r by descending abs(r).
Ranking = list[tuple[str, list[tuple[int, float]]]]


@dataclass
class Reading:
    """What a model did while it read T characters.

    Attributes:
        cells: float32 ``(T, L, H)`` in [-1, 1]: tanh of an LSTM's cells, else the hidden state.
        closed, open: by the name of a gate float64 ``(L, H)``, the part of the time that it was
            below 0.1 and above 0.9.
        loss: mean loss in nats a character, the first not counted.
        bits: float64 ``(T,)``, the surprise at every character; 0 at the first.
        gates: by name float32 ``(K, L, H)``, of the first K characters.
        likeliest, probabilities: ``(K, 5)``, the vocabulary indices that the model thinks likeliest
            to come next, after each of the first K characters, and how likely.
    """

    cells: Tensor
    closed: dict[str, Tensor]
    open: dict[str, Tensor]
    loss: float
    bits: np.ndarray
    gates: dict[str, Tensor] = field(default_factory=dict)
    likeliest: Tensor | None = None
    probabilities: Tensor | None = None


@torch.inference_mode()
def read(model: CharModel, indices: Tensor, keep: int = 0) -> Reading:
    """Have a model in eval mode on the CPU read int64 ``(T, 1)``, T at least 2.

    Args:
        keep: characters K whose gates and likeliest successors to keep.
    """
    hx, all_cells = None, []
    closed: dict[str, Any] = {}
    opened: dict[str, Any] = {}
    kept: dict[str, list[Tensor]] = {}
    best: list[tuple[Tensor, Tensor]] = []
    nats = [torch.zeros(1)]
    for begin in range(0, len(indices), WINDOW):
        window = indices[begin : begin + WINDOW]
        output, cells, gates, hx = _layers(model, window, hx)
        all_cells.append(cells)
        few = max(0, keep - begin)
        for name, gate in gates.items():  # (T, L, H)
            closed[name] = closed.get(name, 0) + (gate < LOW).double().sum(0)
            opened[name] = opened.get(name, 0) + (gate > HIGH).double().sum(0)
            kept.setdefault(name, []).append(gate[:few].clone())
        logits = model.decoder(output)[:, 0]
        best.append(logits[:few].softmax(-1).topk(min(LIKELIEST, model.vocabulary)))
        after = indices[begin + 1 : begin + 1 + len(window), 0]
        nats.append(F.cross_entropy(logits[: len(after)], after, reduction="none"))
    steps, surprise = len(indices), torch.cat(nats).double()
    return Reading(
        torch.cat(all_cells),
        {name: count / steps for name, count in closed.items()},
        {name: count / steps for name, count in opened.items()},
        surprise.sum().item() / (steps - 1),
        (surprise / math.log(2)).numpy(),
        {name: torch.cat(parts) for name, parts in kept.items()},
        torch.cat([place for _, place in best]),
        torch.cat([value for value, _ in best]),
    )


def _layers(
    model: CharModel, indices: Tensor, hx: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    """Output of the stack; cells ``(T, L, H)``; gates by name, alike; the state after."""
    rnn = model.rnn
    if rnn.mode != "LSTM":
        return _layers_of_torch(model, indices, hx)
    weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
    stack = stack_of(rnn)
    output, h_n, c_n, _, gates, cells = forward_and_saved(indices, hx, weights, stack)
    i, f, _, o = gates.movedim(0, 1).chunk(4, dim=-1)
    return output, cells.movedim(0, 1).tanh(), {"input": i, "forget": f, "output": o}, (h_n, c_n)


def _layers_of_torch(
    model: CharModel, indices: Tensor, hx: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    """The same of a gru or rnn, one layer after another, whose cells are its hidden state."""
    rnn = model.rnn
    x = F.one_hot(indices, model.vocabulary).float()
    before = states(hx)[0] if hx is not None else x.new_zeros(rnn.num_layers, 1, rnn.hidden_size)
    hidden, resets, updates = [], [], []
    for layer in range(rnn.num_layers):
        one = type(rnn)(x.shape[-1], rnn.hidden_size)
        wanted = {f"{n}_l0": getattr(rnn, f"{n}_l{layer}")
                  for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
        one.load_state_dict(wanted)
        y, _ = one(x, before[layer : layer + 1])
        if isinstance(rnn, nn.GRU):
            previous = torch.cat([before[layer : layer + 1], y[:-1]])
            z = F.linear(x, one.weight_ih_l0, one.bias_ih_l0)
            z = z + F.linear(previous, one.weight_hh_l0, one.bias_hh_l0)
            reset, update, _ = z.sigmoid().chunk(3, dim=-1)
            resets.append(reset[:, 0])
            updates.append(update[:, 0])
        hidden.append(y[:, 0])
        x = y
    named = {"reset": resets, "update": updates} if resets else {}
    gates = {name: torch.stack(parts, dim=1) for name, parts in named.items()}
    last = as_state([torch.stack([h[-1:] for h in hidden])])
    return x, torch.stack(hidden, dim=1), gates, last


def properties(text: str, ends: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What a cell might keep track of: float64 ``(len(text),)`` each, after every character.

    Args:
        ends: places in the text, where only the values after these are asked for.
    """
    names = ("position in the line", "indentation of the line", "position in the word",
             "inside quotes", "bracket depth", "inside a # comment")  # fmt: skip
    rows = np.zeros((len(text), len(names)))
    column = indent = word = depth = 0
    quote, comment, blank, before = "", False, True, "\n"
    for j, c in enumerate(text):
        if c == "\n":
            column = indent = 0
            comment, blank = False, True
            if quote == "'" or before == "\n":  # a paragraph ends what was left open
                quote = ""
        else:
            column += 1
            blank = blank and c in " \t"
            indent += blank
        word = word + 1 if c.isalnum() else 0
        if quote:
            quote = "" if c == quote else quote
        elif not comment:
            if c in '"“':
                quote = "”" if c == "“" else c
            elif c == "'" and not before.isalnum():  # no apostrophe
                quote = c
            elif c == "#":
                comment = True
            elif c in "([{":
                depth += 1
            elif c in ")]}":
                depth = max(0, depth - 1)
        rows[j] = column, indent, word, bool(quote), depth, comment
        before = c
    return dict(zip(names, (rows if ends is None else rows[ends]).T, strict=True))


def correlations(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pearson's r of every column of ``(T, C)`` with ``(T,)``; 0 where one of them is constant."""
    cells = cells - cells.mean(axis=0, dtype=np.float64)
    values = values - values.mean()
    scale = np.sqrt((cells**2).sum(axis=0) * (values**2).sum())
    return np.divide(values @ cells, scale, out=np.zeros(cells.shape[1]), where=scale > 1e-9)


def ranking(cells: np.ndarray, text: str, best: int = 5, ends: np.ndarray | None = None) -> Ranking:
    """For every property that varies in the text, the cells that follow it most closely.

    Args:
        cells: ``(len(text), C)``, or ``(len(ends), C)``.
        best: cells of a property.
        ends: places of the text after which the cells are known, by default all.

    Returns:
        Properties, the best kept one first, each with ``(cell, r)`` by descending ``abs(r)``.
    """
    by_property = []
    for name, values in properties(text, ends).items():
        if values.min() == values.max():
            continue
        r = correlations(cells, values)
        order = np.argsort(-abs(r), kind="stable")[:best]
        by_property.append((name, [(int(j), float(r[j])) for j in order]))
    return sorted(by_property, key=lambda each: -abs(each[1][0][1]))


def rolled(cells: np.ndarray, text: str, ends: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What chance does: how closely the best cell follows each property of the rolled text.

    A text that is rolled against the cells by any number of characters keeps its lines, words and
    quotes, and the cells keep how slowly they change; only what one has to do with the other is
    lost. So the best of all cells there says how good the best one is by chance.

    Args:
        cells: ``(T, C)``, of a text of T characters.
        ends: as of :func:`ranking`; T is then their number.

    Returns:
        By property the largest ``abs(r)`` of any cell for each of the T rolls, descending.
    """
    steps = len(cells)

    def standard(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(axis=0, dtype=np.float64)
        size = np.sqrt((x**2).sum(axis=0))
        return np.divide(x, size, out=np.zeros_like(x), where=size > 1e-9)

    kept = {name: np.fft.rfft(standard(values)).conj()
            for name, values in properties(text, ends).items()}  # fmt: skip
    best = {name: np.zeros(steps) for name in kept}
    for begin in range(0, cells.shape[1], 64):
        waves = np.fft.rfft(standard(cells[:, begin : begin + 64]).T, axis=1)
        for name, wave in kept.items():
            r = abs(np.fft.irfft(waves * wave, steps, axis=1)).max(axis=0)
            best[name] = np.maximum(best[name], r)
    return {name: -np.sort(-values) for name, values in best.items()}


def by_chance(rolls: np.ndarray, r: float) -> float:
    """The part of the rolls in which some cell follows the property as closely as r."""
    return float((rolls >= abs(r) - 1e-9).mean())


def untrained(model: CharModel, architecture: dict[str, Any]) -> Iterator[CharModel]:
    """Models of the same sizes with fresh weights, the same ones every time, in eval mode."""
    for seed in range(UNTRAINED):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield CharModel(model.vocabulary, **architecture).eval()


def best_of(rankings: Sequence[Ranking]) -> dict[str, float]:
    """By property the largest ``abs(r)`` in several models' rankings."""
    found: dict[str, float] = {}
    for ranking in rankings:
        for name, best in ranking:
            found[name] = max(found.get(name, 0.0), abs(best[0][1]))
    return found


def standing_out(
    ranking: Ranking,
    of_untrained: Sequence[Ranking],
    length: int,
    rolls: dict[str, np.ndarray],
) -> tuple[Ranking, list[str]]:
    """The part of a ranking that training made, and the properties that have no cell in it.

    A cell of a model that learned nothing follows a property too: it reads the same characters, and
    of many cells one follows it best. So a cell has to be closer than the best one of any of such
    models, in Fisher's z (the inverse tanh of r) by two standard errors and by 0.2 at least: among
    pages on models that were not trained either, fewer than one in a hundred then names a cell.
    And no more than one roll in fifty may have a cell as close.

    Args:
        ranking: of the model, as of :func:`ranking`.
        of_untrained: those of :func:`untrained`'s models on the same text.
        length: characters of the text, of which every tenth counts as an independent one.
        rolls: of the model, as of :func:`rolled`.
    """
    margin = max(0.2, 2 / math.sqrt(length / 10))
    fresh = best_of(of_untrained)

    def z(r: float) -> float:
        return math.atanh(min(abs(r), 1 - 1e-9))

    kept, others = [], []
    for name, best in ranking:
        bound = margin + z(fresh[name])
        if closer := [(cell, r) for cell, r in best
                      if z(r) > bound and by_chance(rolls[name], r) <= CHANCE]:  # fmt: skip
            kept.append((name, closer))
        else:
            others.append(name)
    return kept, others
