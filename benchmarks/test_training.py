"""Karpathy's whole training step, and what of it is outside the LSTM: ``make bench-cpu``.

He had 0.46 s a batch on a TITAN Z (char-rnn's 2x512 with batch 100 and length 100).
"""

from __future__ import annotations

import pytest
import torch

from fastlstm.text.model import CharModel, loss_nats

from .grid import KARPATHY
from .timing import interleaved_cpu

TITAN_Z_MS = 460.0


def sizes(quick: bool) -> tuple[int, int, int]:
    """Units, batch and length."""
    return (32, 4, 10) if quick else (512, 100, 100)


@pytest.mark.parametrize(("kind", "least"), [("fp32", 1.35), ("bf16", 2.2)])
def test_trainer_step(kind, least, benchmark, rows, quick):
    """Karpathy's whole training step: model, loss, clipping and Adam."""
    steps = {}
    units, batch, length = sizes(quick)
    tokens = torch.randint(65, (length + 1, batch))
    for name, cell in (("torch", "torch-lstm"), ("ours", "lstm")):
        model = CharModel(65, cell, units, 2, 0.0)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)

        def step(model=model, optimizer=optimizer, lower=name == "ours" and kind == "bf16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                loss = loss_nats(model(tokens[:-1])[0], tokens[1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

        steps[name] = step
    found = {name: 1e3 * s.median for name, s in interleaved_cpu(steps, 5).items()}
    ratio = found["torch"] / found["ours"]
    row = {
        "what": "a training step", "case": f"{KARPATHY.name}, {kind} against torch's fp32",
        **found, "ratio": ratio, "target": f">= {least}", "met": "" if ratio >= least else "missed",
    }  # fmt: skip
    rows.append(row)
    rate = 1e3 * batch * length / found["ours"]
    benchmark.extra_info.update(row, characters_per_second=rate, titan_z_ms=TITAN_Z_MS)
    benchmark.pedantic(steps["ours"], rounds=1)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_time_outside_the_lstm(kind, benchmark, rows, quick):
    """Of the same step: everything but the stack's own forward and backward pass."""
    units, batch, length = sizes(quick)
    tokens = torch.randint(65, (length + 1, batch))
    model = CharModel(65, "lstm", units, 2, 0.0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    gradient = torch.randn(length, batch, units)

    def lower():
        return torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16")

    def step():
        with lower():
            loss = loss_nats(model(tokens[:-1])[0], tokens[1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    def alone():
        with lower():
            output = model.rnn(tokens[:-1])[0]
        output.backward(gradient.to(output.dtype))
        for p in model.rnn.parameters():
            p.grad = None

    found = interleaved_cpu({"step": step, "alone": alone}, 5)
    whole, own = (1e3 * found[name].median for name in ("step", "alone"))
    row = {
        "what": "outside the LSTM", "case": f"{KARPATHY.name}, {kind}: {1 - own / whole:.0%}",
        "ours": whole - own, "target": "<= 10 %", "met": "" if own >= 0.9 * whole else "missed",
    }  # fmt: skip
    rows.append(row)
    benchmark.extra_info.update(row, step_ms=whole, lstm_ms=own)
    benchmark.pedantic(step, rounds=1)
