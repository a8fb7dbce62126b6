"""Interleaved timing: every round runs every candidate once, and medians are compared.

So a change of clocks or a busy neighbour meets all candidates alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

Clock = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Samples:
    """Seconds a call, one for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def wall(call: Callable[[], object], calls: int) -> float:
    """Seconds a call by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def events(call: Callable[[], object], calls: int) -> float:
    """Seconds a call between two CUDA events around all of them."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock = wall,
    region: float = 0.01,
    budget: float = 8.0,
    pause: float = 0.0,
) -> dict[str, Samples]:
    """Time the candidates in turn, ``rounds`` times. A round repeats calls for ``region`` seconds.

    With ``pause`` each round of a candidate comes so many seconds after the last one's, and calls
    that take less than the pause go twice, timed the second time: ONNX Runtime's threads spin for
    tens of milliseconds after a call, and slowed by up to twice whoever came next on their cores.

    Two calls of each go before: the first loads and plans, the second says how long one takes.
    Rounds are fewer, but at least three, where they would take more than ``budget`` seconds. A
    first call that takes that long by itself is its candidate's only sample.
    """
    repeats: dict[str, int] = {}
    short = set()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    round_seconds = 0.0
    for name, call in candidates.items():
        once = clock(call, 1)
        if once > budget:
            seconds[name].append(once)
            continue
        once = max(clock(call, 1), 1e-7)
        repeats[name] = max(1, round(region / once))
        round_seconds += once * repeats[name]
        if once < pause:
            short.add(name)
    for _ in range(min(rounds, max(3, int(budget / max(round_seconds, 1e-7))))):
        for name, number in repeats.items():
            time.sleep(pause)
            if name in short:
                clock(candidates[name], number)
            seconds[name].append(clock(candidates[name], number))
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


# On a CPU, where threads of the last candidate may still spin.
ROUNDS = 7
interleaved_cpu = partial(interleaved, pause=0.1, region=0.03)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(x) for x in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
