"""The character-level model: a recurrent stack on one-hot characters, and a linear decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import LSTM
from . import UserError
from .alphabet import Alphabet

# fastlstm.LSTM takes the indices as they are; the others are torch's, on one-hot vectors.
CELLS = {"lstm": LSTM, "torch-lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ARCHITECTURE = ("cell", "hidden_size", "num_layers", "dropout")


class CharModel(nn.Module):
    """Predicts the next character, as char-rnn does.

    Args:
        vocabulary: number of different characters, the width V of input and output.
        cell: one of :data:`CELLS`.
        hidden_size, num_layers: of the recurrent stack.
        dropout: after every layer, the last included.
    """

    def __init__(
        self, vocabulary: int, cell: str, hidden_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.vocabulary, self.one_hot = vocabulary, cell != "lstm"
        kind: Any = CELLS[cell]
        between = dropout if num_layers > 1 else 0.0
        self.rnn = kind(vocabulary, hidden_size, num_layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden_size, vocabulary)

    def forward(self, indices: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """int64 ``(T, B)`` to logits ``(T, B, V)``, and the state after the last step."""
        x = indices
        if self.one_hot:
            dtype, device = self.decoder.weight.dtype, indices.device.type
            if torch.is_autocast_enabled(device):  # torch's own LSTM does not cast on a CPU
                dtype = torch.get_autocast_dtype(device)
            x = F.one_hot(indices, self.vocabulary).to(dtype)
        output, hx = self.rnn(x, hx)
        output = self.dropout(output)
        if output.dtype == self.decoder.weight.dtype or output.device.type != "cpu":
            return self.decoder(output), hx
        # Under autocast: half types are slow in torch's own products on most CPUs.
        with torch.autocast("cpu", enabled=False):
            return self.decoder(output.float()), hx


def build(meta: dict[str, Any], tensors: dict[str, Tensor], name: Any) -> CharModel:
    """The model in eval mode that a checkpoint's ``meta`` describes, with its ``tensors``.

    Raises:
        UserError: they do not describe a model of ours, or do not fit each other.
    """
    architecture = meta["model"]
    types = (str, int, int, float)
    values = [architecture.get(key) for key in ARCHITECTURE]
    vocabulary = meta["vocabulary"]
    if (
        any(type(value) is not kind for value, kind in zip(values, types, strict=True))
        or not (
            architecture["cell"] in CELLS
            and architecture["hidden_size"] >= 1
            and 0 <= architecture["dropout"] < 1
        )
        or not 1 <= architecture["num_layers"] <= len(tensors)  # before a loop over as many
        or not Alphabet.valid(meta)
    ):
        raise UserError(f"the checkpoint {name} describes no model of ours")
    try:
        with torch.device("meta"):  # no memory yet, whatever sizes it claims
            model = CharModel(len(vocabulary), *values)
    except RuntimeError as error:
        raise UserError(f"the checkpoint {name} describes too large a model") from error
    load(model, tensors, name)
    return model.eval()


def seen_of(meta: dict[str, Any]) -> list[int]:
    """The characters that a checkpoint's model was trained on.

    An older version also listed those of the run that it began with, in the vocabulary or not.
    """
    return meta.get("seen", meta["vocabulary"])  # checkpoints of older versions have none


def load(model: CharModel, tensors: dict[str, Tensor], name: Any) -> None:
    """Give a model its weights.

    Raises:
        UserError: names, shapes or dtypes are not the model's, or a weight is no finite number.
    """
    wanted = {key: (value.shape, torch.float32) for key, value in model.state_dict().items()}
    if {key: (value.shape, value.dtype) for key, value in tensors.items()} != wanted:
        raise UserError(f"the checkpoint {name} does not fit the model that its run describes")
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"the checkpoint {name} holds weights that are no finite numbers")
    device = model.decoder.weight.device
    weights = {k: v.clone() if device.type == "meta" else v for k, v in tensors.items()}
    model.load_state_dict(weights, assign=device.type == "meta")


def predict_frequencies(model: CharModel, counts: Tensor) -> None:
    """Let an untrained model begin with how often characters occur, whatever came before.

    The biases of its output layer become the logarithms of the frequencies. All characters together
    count as seen once more than they were, so that none is impossible. The model then learns much
    faster, above all where many characters are rare.

    Args:
        counts: int64 ``(V,)``, how often each character occurs.
    """
    seen = counts.double() + 1 / len(counts)
    with torch.no_grad():
        model.decoder.bias.copy_((seen / seen.sum()).log())


def adopt(
    model: CharModel,
    vocabulary: list[int],
    other: CharModel,
    other_vocabulary: list[int],
    seen: list[int],
) -> None:
    """Copy another model's weights; a character that it has not seen keeps its fresh ones.

    The two have the same architecture but for the vocabularies (of one unit, ascending).

    Args:
        seen: the characters that the other model was trained on.
    """
    shared = sorted(set(vocabulary) & set(other_vocabulary) & set(seen))
    mine, theirs = (
        torch.tensor([place[v] for v in shared], dtype=torch.int64)
        for place in ({v: j for j, v in enumerate(each)} for each in (vocabulary, other_vocabulary))
    )
    source = other.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():  # the tensors are the model's own
            if name == "rnn.weight_ih_l0":
                target[:, mine] = source[name][:, theirs].to(target)
            elif name.startswith("decoder."):
                target[mine] = source[name][theirs].to(target)
            else:
                target.copy_(source[name])


def states(hx: Any) -> list[Tensor]:
    """The tensors of a state: one for gru and rnn, two for an LSTM, none for None."""
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def as_state(tensors: list[Tensor]) -> Any:
    """The state that :func:`states` took apart."""
    return None if not tensors else tensors[0] if len(tensors) == 1 else tuple(tensors)


def detached(hx: Any) -> Any:
    """The same state, through which no gradient flows back."""
    return as_state([x.detach() for x in states(hx)])


def loss_nats(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats a character of logits ``(T, B, V)`` and int64 ``(T, B)``."""
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())


@torch.no_grad()
def evaluate(model: CharModel, streams: Any, device: torch.device) -> tuple[float, int]:
    """Summed loss in nats over a split, with a carried state of its own, and its characters.

    Training mode is kept and no random number is drawn, so that training goes on as if not asked.
    """
    training = model.training
    model.eval()
    total, count, hx = 0.0, 0, None
    for j in range(streams.windows):
        x, y = streams.window(j)
        if not y.numel():  # fewer streams than processes
            break
        logits, hx = model(x.to(device), hx)
        total += loss_nats(logits, y.to(device)).item() * y.numel()
        count += y.numel()
    model.train(training)
    return total, count
