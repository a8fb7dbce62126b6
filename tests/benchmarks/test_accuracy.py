"""How far from the float64 reference parity allows, where a problem amplifies roundings."""

import torch

from benchmarks import accuracy
from benchmarks.gpu import checks
from benchmarks.problems import NORM_FACTOR, NORMED, Problem, make, outputs_and_gradients
from fastlstm import ops, reference


def to_tf32(x):
    """The nearest numbers of ten bits, ties away from zero, as the tensor cores take them."""
    bits = x.float().view(torch.int32)
    return (bits + 0x1000 & ~0x1FFF).view(torch.float32).to(x)


class Tf32(accuracy.Disturbed):
    def _moved(self, x, roundoff):
        return to_tf32(x) if roundoff == 2**-11 else x


def test_the_limit_of_a_normalised_problem_lets_an_ideal_tf32_pass():
    """Right but for its rounding, it is far off in draws that multiply a rounding."""
    base = NORM_FACTOR * accuracy.PRECISIONS["tf32"][2]
    beyond, limits = 0, []
    for name, options in NORMED.items():
        for seed in range(5):
            p = Problem(random_seed=seed, **options)
            x = make(p).to(torch.float64)
            exact = outputs_and_gradients(reference.lstm, x)
            with Tf32("tf32", 0):
                ideal = accuracy.distance(outputs_and_gradients(reference.lstm, x), exact)
            limits.append(accuracy.limit_of(p, "tf32"))
            assert ideal.relative < limits[-1], f"{name}, {seed}"
            beyond += ideal.relative > base
    assert beyond > 0
    assert sorted(limits)[len(limits) // 2] == base  # most are well conditioned
    assert accuracy.limit_of(Problem(), "tf32") == accuracy.PRECISIONS["tf32"][2]


def test_parity_sees_a_wrong_gain(monkeypatch):
    def with_a_wrong_gain(input, state, weights, *described):
        wrong = [*weights[:-2], 1.1 * weights[-2], weights[-1]]
        return ops.lstm(input, state, wrong, *described)

    monkeypatch.setattr(checks, "candidates_for", lambda _: {"fastlstm": with_a_wrong_gain})
    name = "layer norm, both directions"
    for kind in ("bf16", "fp32"):
        found = checks.parity(name, kind, "auto", "cpu", seeds=2)
        assert len(found["failed"]) == 1
        assert "is off by" in found["failed"][0]
