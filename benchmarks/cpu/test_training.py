"""Karpathy's whole training step, and what of it is outside the LSTM: ``make bench-cpu``.

He had 0.46 s a batch on a TITAN Z (char-rnn's 2x512 with batch 100 and length 100).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlstm.text.model import CharModel, loss_nats

from ..cases import KARPATHY, Case
from ..suite import ROWS, Group

TITAN_Z_MS = 460.0
CELLS = {"fastlstm": "lstm", "torch": "torch-lstm"}


def autocast(lower: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=lower)


def whole_step(model: CharModel, tokens: torch.Tensor, lower: bool) -> Callable[[], float]:
    """Model, loss, clipping and Adam; returns the loss."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def step() -> float:
        with autocast(lower):
            loss = loss_nats(model(tokens[:-1])[0], tokens[1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return float(loss)

    return step


def flops(case: Case) -> float:
    """Of the products of the stack and of the decoder."""
    decoder = 2 * case.hidden_size * case.input_size * case.batch * case.steps
    return case.flops(True) + 3.0 * decoder


@pytest.mark.parametrize("backend", list(CELLS))
@pytest.mark.parametrize(("kind", "least"), [("fp32", 1.35), ("bf16", 2.2)])
def test_trainer_step(kind, least, backend, suite):
    """Ours in fp32 or bf16, nn.LSTM in fp32."""

    def measure() -> Group:
        case = suite.sized(KARPATHY)
        sizes = (case.hidden_size, case.num_layers, 0.0)
        tokens = torch.randint(case.input_size, (case.steps + 1, case.batch))
        models = {name: CharModel(case.input_size, cell, *sizes) for name, cell in CELLS.items()}
        models["fastlstm"].load_state_dict(models["torch"].state_dict())
        lower = {"fastlstm": kind == "bf16", "torch": False}
        steps = {name: whole_step(model, tokens, lower[name]) for name, model in models.items()}
        losses = {name: step() for name, step in steps.items()}
        assert losses["fastlstm"] == pytest.approx(losses["torch"], rel=0.01)
        group = suite.time(steps, flops(case), kind)
        times = group.milliseconds()
        group.info["torch"]["ceiling"] = "multiply_adds"
        for name, ms in times.items():
            rate = 1e3 * case.batch * case.steps / ms
            group.info[name] |= {"characters_per_second": rate, "titan_z_ms": TITAN_Z_MS}
        ratio = times["torch"] / times["fastlstm"]
        ROWS.append({
            "what": "a training step", "case": f"{KARPATHY.name}, {kind} against torch's fp32",
            **times, "ratio": ratio, "target": f">= {least}",
            "met": "" if ratio >= least else "missed",
        })  # fmt: skip
        return group

    suite.report(f"a training step: {KARPATHY.name}, {kind}", backend, measure)


@pytest.mark.parametrize("part", ["the whole step", "the stack alone"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_time_outside_the_lstm(kind, part, suite):
    """Of the same step: everything but the stack's own forward and backward pass."""

    def measure() -> Group:
        case = suite.sized(KARPATHY)
        tokens = torch.randint(case.input_size, (case.steps + 1, case.batch))
        model = CharModel(case.input_size, "lstm", case.hidden_size, case.num_layers, 0.0)
        gradient = torch.randn(case.steps, case.batch, case.hidden_size)
        lower = kind == "bf16"

        def alone():
            with autocast(lower):
                output = model.rnn(tokens[:-1])[0]
            output.backward(gradient.to(output.dtype))
            for p in model.rnn.parameters():
                p.grad = None

        calls = {"the whole step": whole_step(model, tokens, lower), "the stack alone": alone}
        group = suite.time(calls, case.flops(True), kind)
        group.info["the whole step"]["flops"] = flops(case)
        whole, own = group.milliseconds().values()
        ROWS.append({
            "what": "outside the LSTM", "case": f"{KARPATHY.name}, {kind}: {1 - own / whole:.0%}",
            "fastlstm": whole - own, "target": "<= 10 %",
            "met": "" if own >= 0.9 * whole else "missed",
        })  # fmt: skip
        return group

    suite.report(f"outside the LSTM: {KARPATHY.name}, {kind}", part, measure)
