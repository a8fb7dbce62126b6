"""Real models from the registry, converted: outputs and gradients stay what they were.

The weights are random. A package that is not installed is skipped: ``pip install '.[models]'``.
"""

import copy

import pytest
import torch
from torch import nn

import fastlstm

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_same(model, run, tolerance=1e-4):
    """``run(model)`` gives tensors; every one's gradient reaches every parameter alike."""
    count = sum(isinstance(m, nn.LSTM) for m in model.modules())
    assert count > 0
    ours = fastlstm.from_torch(copy.deepcopy(model))
    assert sum(isinstance(m, fastlstm.LSTM) for m in ours.modules()) == count
    assert not any(isinstance(m, nn.LSTM) for m in ours.modules())
    found = []
    for m in (ours, model):
        results = [y for y in run(m) if y.requires_grad]
        parameters = dict(m.named_parameters())
        grads = torch.autograd.grad(
            sum(y.square().sum() for y in results), list(parameters.values()), allow_unused=True
        )
        found.append((results, dict(zip(parameters, grads, strict=True))))
    (a, a_grads), (b, b_grads) = found
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert a_grads.keys() == b_grads.keys()
    # Of a bias behind which a softmax stands the gradient is zero: what is left of a sum of terms
    # as large as the other gradients, rounded.
    largest = max(y.abs().max().item() for y in b_grads.values() if y is not None)
    rounding = 64 * torch.finfo(torch.float32).eps * largest
    for name, x in a_grads.items():
        y = b_grads[name]
        assert (x is None) == (y is None), name
        if x is not None:
            bound = 10 * tolerance * max(1e-3, y.abs().max().item())
            assert (x - y).abs().max().item() <= max(bound, rounding), name


def test_encodec():
    """transformers' audio codec: two LSTMs inside its encoder and its decoder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16)
    torch.manual_seed(0)
    model = transformers.EncodecModel(config).eval()
    audio = torch.randn(2, 1, 1600)
    assert_same(model.encoder, lambda m: [m(audio)])
    assert_same(model.decoder, lambda m: [m(torch.randn(2, 16, 9, generator=seeded()))])


@pytest.mark.parametrize("model", ["jumping knowledge", "aggregation", "gnn"])
def test_graph_networks(model):
    """torch_geometric: an LSTM over layers, and one over neighbours."""
    geometric = pytest.importorskip("torch_geometric.nn")
    x = torch.randn(10, 8)
    edges = torch.randint(10, (2, 30), generator=seeded())
    edges = edges[:, edges[1].argsort()]
    torch.manual_seed(0)
    if model == "jumping knowledge":
        layer = geometric.JumpingKnowledge("lstm", channels=8, num_layers=3)
        assert_same(layer, lambda m: [m([x, x.tanh(), x.sin()])])
    elif model == "aggregation":
        layer = geometric.LSTMAggregation(8, 5)
        assert_same(layer, lambda m: [m(x, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3]))])
    else:
        gnn = geometric.GraphSAGE(8, 16, num_layers=2, out_channels=3, jk="lstm")
        assert_same(gnn, lambda m: [m(x, edges)])


def test_recurrent_policy():
    """sb3-contrib's PPO: LSTMs of the actor and of the critic, states kept between calls."""
    pytest.importorskip("sb3_contrib")
    import numpy
    from gymnasium import spaces
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    torch.manual_seed(0)
    policy = RecurrentActorCriticPolicy(
        spaces.Box(-1, 1, (6,), dtype=numpy.float32), spaces.Discrete(3), lambda _: 1e-3,
        lstm_hidden_size=16,
    )  # fmt: skip
    observations, starts = torch.randn(5, 6), torch.tensor([1.0, 0, 0, 1, 0])
    actions = torch.tensor([0, 1, 2, 0, 1])

    def run(m):
        zeros = torch.zeros(1, 1, 16), torch.zeros(1, 1, 16)
        values, log_prob, entropy = m.evaluate_actions(
            observations, actions, RNNStates(zeros, zeros), starts
        )
        return [values, log_prob, entropy]

    assert_same(policy, run)


def seeded():
    return torch.Generator().manual_seed(0)
