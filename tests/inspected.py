"""What the tests of ``python -m fastlstm.inspect`` share: small models, and pages of them."""

import base64
import re

import numpy as np
import torch

from fastlstm.inspect import main
from fastlstm.text import checkpoint
from fastlstm.text.model import CharModel
from fastlstm.text.opening import load_model

TEXT = 'def f(x):\n    """Quoted \'text\' é."""\n    return (x, [x])  # it\'s </script>&amp;\n' * 6


def random_model(cell, vocabulary=7, hidden_size=5):
    """Untrained, with weights large enough to saturate gates."""
    model = CharModel(vocabulary, cell, hidden_size, 2, 0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def counting(model, newline):
    """Have cell 0 of the first layer count the characters of a line."""
    rnn, h = model.rnn, model.rnn.hidden_size
    with torch.no_grad():
        for gate in range(4):
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                getattr(rnn, name)[gate * h] = 0
        rnn.bias_ih_l0[[0, h]] = 20.0  # the input and the forget gate stand open
        rnn.weight_ih_l0[[0, h], newline] = -40.0  # but for a newline
        rnn.bias_ih_l0[2 * h] = 0.02
    return model


def saved(folder, unit, vocabulary, model=None):
    if model is None:
        model = counting(random_model("lstm", len(vocabulary)), vocabulary.index(10))
    cell = model.rnn.mode.split("_")[0].lower()
    meta = {"format": 1, "step": 3, "position": 0, "epoch": 0, "unit": unit,
            "vocabulary": vocabulary,
            "model": {"cell": cell, "hidden_size": 5, "num_layers": 2, "dropout": 0.0}}  # fmt: skip
    checkpoint.save(folder / "run" / "checkpoints" / "latest", model.state_dict(), {}, meta)
    return folder / "run"


def inspected(run, tmp_path, text=TEXT, *arguments):
    path = tmp_path / "text"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    main([str(run), "--text", str(path), "--out", str(tmp_path / "page.html"), *arguments])
    return (tmp_path / "page.html").read_text()


def block(page, name, kind=np.uint8):
    """Numbers that a page holds for its script."""
    raw = re.search(rf'id="{name}">([^<]*)<', page)[1]
    return np.frombuffer(base64.b64decode(raw), kind)


def values(page, cells=10, view="cells"):
    return block(page, f"values-{view}").reshape(cells, -1)


def probe_model(run):
    return load_model(run, "latest")[:2]
