"""What describes a stack of LSTM layers and a call of it: the words that the package shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ALGORITHMS", "INDEX_TYPES", "NORMS", "PLAIN", "Call", "Stack", "State"]

State = tuple[Tensor, Tensor]  # h and c

INDEX_TYPES = (torch.int32, torch.int64)  # of input that stands for one-hot rows

# Parameters of a layer-normalised cell, behind the others.
NORMS = ["norm_ih", "norm_hh", "norm_c", "norm_c_bias"]

ALGORITHMS = ("auto", "stepwise", "cluster", "grid")  # csrc/cuda/planner.h's order


class Stack(NamedTuple):
    """A stack's sizes and options: all that decides its parameters' shapes and its equations.

    L layers of H units in D directions read an input of width I; h has width P.

    Attributes:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: whether the cells have biases.
        proj_size: P, where h is projected; else 0, and P is H.
        bidirectional: whether a second direction reads the sequence backwards; D is 2, else 1.
        recurrent_dropout, zoneout_h, zoneout_c, cell_clip: the rules of its cells, which
            ``nn.LSTM`` lacks. With r, z_c and z_h drawn from the seed at every step::

                c~_t = f * c_{t-1} + i * (r * g),     |c~_t| <= cell_clip
                h~_t = o * tanh(c~_t)
                c_t  = (1 - z_c) * c~_t + z_c * c_{t-1}
                h_t  = (1 - z_h) * h~_t + z_h * h_{t-1}

            r is 0 with probability recurrent_dropout, else 1 / (1 - recurrent_dropout) (Semeniuta,
            Severyn and Barth, 2016, "Recurrent Dropout without Memory Loss"). z_c and z_h are 1
            with probability zoneout_c and zoneout_h, else 0; without a seed they are those
            probabilities (Krueger et al., 2017, "Zoneout"). A cell_clip of 0 is none.
        layer_norm: normalise the two products of the gates, and c on its way to h (Ba, Kiros and
            Hinton, 2016)::

                a   = norm_ih * norm(W_ih x_t) + b_ih + norm_hh * norm(W_hh h_{t-1}) + b_hh
                h_t = o * tanh(norm_c * norm(c_t) + norm_c_bias)

            with norm(v) = (v - mean v) / sqrt(var v + 1e-5), over all four gates or over c.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    proj_size: int = 0
    bidirectional: bool = False
    # Whole zeros: with dynamic shapes torch.compile takes a default of 0.0 for a variable.
    recurrent_dropout: float = 0
    zoneout_h: float = 0
    zoneout_c: float = 0
    cell_clip: float = 0
    layer_norm: bool = False

    @property
    def out_size(self) -> int:
        """P: elements of h."""
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def pseudo_layers(self) -> int:
        """L*D: one direction of one layer is a pseudo-layer, as cuDNN calls it."""
        return self.num_layers * self.directions

    @property
    def has_rules(self) -> bool:
        """Whether the cells do what ``nn.LSTM``'s do not; layer_norm apart."""
        return self.needs_seed or self.cell_clip > 0

    @property
    def needs_seed(self) -> bool:
        """Whether the cells need a seed in training."""
        return max(self.recurrent_dropout, self.zoneout_h, self.zoneout_c) > 0

    @property
    def weight_kinds(self) -> list[str]:
        """Names of one pseudo-layer's weights, without layer and direction, in their order."""
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size > 0 else []
        return kinds + (NORMS if self.layer_norm else [])

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Of all weights, in the order of ``nn.LSTM``'s parameters."""
        gates, out = 4 * self.hidden_size, self.out_size
        rest: list[tuple[int, ...]] = [(gates, out)]
        if self.bias:
            rest += [(gates,), (gates,)]
        if self.proj_size > 0:
            rest += [(out, self.hidden_size)]
        if self.layer_norm:
            rest += [(gates,), (gates,), (self.hidden_size,), (self.hidden_size,)]
        first = [(gates, self.input_size), *rest] * self.directions
        deeper = [(gates, self.directions * out), *rest] * self.directions
        return first + deeper * (self.num_layers - 1)

    def weight_name(self, position: int) -> str:
        """Of the weight at that place in the same order."""
        kinds = self.weight_kinds
        pseudo_layer, kind = divmod(position, len(kinds))
        layer, direction = divmod(pseudo_layer, self.directions)
        return f"{kinds[kind]}_l{layer}{'_reverse' if direction else ''}"


class Call(NamedTuple):
    """What one call decides.

    Attributes:
        dropout: the probability of dropping an element between layers, 0 where nothing is dropped.
        seed: one int64 element, from which everything is drawn; None where nothing is.
        batch_sizes: int64 ``(T,)`` on the CPU, the number of sequences that reach each step of
            packed input; None where input is not packed.
        return_cells: whether to return the cell states of every step too.
    """

    dropout: float = 0.0
    seed: Tensor | None = None
    batch_sizes: Tensor | None = None
    return_cells: bool = False


PLAIN = Call()
