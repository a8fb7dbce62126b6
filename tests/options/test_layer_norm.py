"""``layer_norm=True``: the layer-normalised LSTM of Ba, Kiros and Hinton (2016)."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlstm
from benchmarks.problems import Problem, assert_matches_reference


def by_hand(lstm, x):
    """One layer, one direction, from the definition."""
    h = c = x.new_zeros(x.shape[1], lstm.hidden_size)
    wide, units = (4 * lstm.hidden_size,), (lstm.hidden_size,)
    outputs = []
    for t in range(len(x)):
        from_x = F.layer_norm(x[t] @ lstm.weight_ih_l0.t(), wide, lstm.norm_ih_l0)
        from_h = F.layer_norm(h @ lstm.weight_hh_l0.t(), wide, lstm.norm_hh_l0)
        i, f, g, o = (from_x + lstm.bias_ih_l0 + from_h + lstm.bias_hh_l0).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, units, lstm.norm_c_l0, lstm.norm_c_bias_l0).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def scattered(*sizes, **options):
    """A module whose gains and biases are no longer what they were at first."""
    lstm = fastlstm.LSTM(*sizes, **options, layer_norm=True)
    with torch.no_grad():
        for p in lstm.parameters():
            p.add_(torch.randn_like(p) / 4)
    return lstm


def test_it_is_what_the_paper_says():
    lstm = scattered(3, 21).double()
    x = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    results = []
    for output in (lstm(x)[0], by_hand(lstm, x)):
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("hidden", [3, 7, 16, 129])
def test_odd_sizes_match_the_reference(hidden, instruction_set):
    for batch, steps in ((1, 3), (3, 1), (13, 5)):
        assert_matches_reference(
            Problem(hidden_size=hidden, batch=batch, steps=steps, layer_norm=True)
        )


def test_threads_change_nothing():
    lstm = scattered(5, 70, 2, bidirectional=True)
    x, before = torch.randn(11, 9, 5), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, _ = lstm(x)
            results.append([output, *torch.autograd.grad(output.sum(), list(lstm.parameters()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_derivatives():
    lstm = scattered(2, 3, 2).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *weights):
        output, (h_n, c_n) = fastlstm.functional.lstm(
            x, None, weights, num_layers=2, layer_norm=True
        )
        return output, h_n, c_n

    given = (x, *lstm.parameters())
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)
    found = torch.func.vmap(lambda x: lstm(x)[0])(torch.stack([x, 2 * x]).detach())
    torch.testing.assert_close(found[1], lstm(2 * x)[0])


@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
def test_one_compiled_graph(save):
    lstm, x = scattered(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True)
    with torch.set_grad_enabled(save):
        torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
    if save:
        grads = [torch.autograd.grad(m(x)[0].sum(), list(lstm.parameters()))
                 for m in (compiled, lstm)]  # fmt: skip
        torch.testing.assert_close(*grads)


def test_every_form_of_input():
    lstm = scattered(5, 6, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 7, 5), [3, 7, 1, 5]
    output, (h_n, _) = lstm(x, lengths=lengths)
    for b, n in enumerate(lengths):
        alone, (own, _) = lstm(x[b, :n])
        torch.testing.assert_close(output[b, :n], alone)
        torch.testing.assert_close(h_n[:, b], own)
    index = torch.randint(5, (4, 7))
    torch.testing.assert_close(lstm(index)[0], lstm(F.one_hot(index, 5).float())[0])
    with pytest.raises(NotImplementedError, match="layer_norm: expected lengths on the CPU"):
        torch.func.vmap(lambda n: lstm(x, lengths=n)[0])(torch.tensor([lengths]))


def test_other_options_go_along():
    lstm = scattered(3, 5, zoneout_h=0.2, cell_clip=0.7, weight_dropout=0.3, checkpoint_every=2)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    lstm(x)[0].sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in lstm.parameters())
    plain = scattered(3, 5, zoneout_h=0.2, cell_clip=0.7)
    plain.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(lstm.eval()(x)[0], plain.eval()(x)[0])


def test_it_learns_and_text_can_be_drawn():
    """A repeated string; drawn step by step, since packed weights have no gains."""
    torch.manual_seed(0)
    text = torch.tensor([0, 1, 2, 3, 2, 1] * 20)[:, None]
    lstm = fastlstm.LSTM(4, 16, layer_norm=True)
    decoder = nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*lstm.parameters(), *decoder.parameters()], 0.02)
    for _ in range(40):
        loss = F.cross_entropy(decoder(lstm(text[:-1])[0]).flatten(0, 1), text[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    tokens, _ = fastlstm.generate(lstm, decoder, text[:6], 12, temperature=0)
    assert torch.equal(tokens, text[6:18])
    with pytest.raises(ValueError, match="layer_norm cannot be packed"):
        fastlstm.prepack(lstm, decoder)


def test_parameters():
    lstm = fastlstm.LSTM(3, 4, 2, bidirectional=True, layer_norm=True)
    shapes = {name: tuple(p.shape) for name, p in lstm.named_parameters() if "norm" in name}
    assert len(shapes) == 16
    assert shapes["norm_ih_l0"] == shapes["norm_hh_l1_reverse"] == (16,)
    assert shapes["norm_c_l1"] == shapes["norm_c_bias_l0_reverse"] == (4,)
    assert len(lstm._flat_weights) == len(lstm.all_weights) * 8 == 32
    lstm.reset_parameters()
    assert (lstm.norm_hh_l1 == 1).all()
    assert (lstm.norm_c_bias_l1 == 0).all()
    assert lstm.weight_hh_l0.abs().max() <= 0.5
    assert repr(lstm) == "fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, layer_norm=True)"
    x = torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(twin(x)[0], lstm(x)[0])
    other = fastlstm.LSTM(3, 4, 2, bidirectional=True, layer_norm=True)
    other.load_state_dict(lstm.state_dict())
    assert torch.equal(other(x)[0], lstm(x)[0])
    # nn.LSTM's weights load, and the gains stay.
    missing, unexpected = lstm.load_state_dict(
        nn.LSTM(3, 4, 2, bidirectional=True).state_dict(), strict=False
    )
    assert (len(missing), unexpected) == (16, [])
    with pytest.raises(ValueError, match=r"^module: nn.LSTM has no layer_norm"):
        fastlstm.to_torch(lstm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types(dtype):
    lstm = fastlstm.LSTM(3, 4, layer_norm=True, dtype=dtype)
    assert lstm(torch.randn(5, 2, 3, dtype=dtype))[0].dtype == dtype
    single = copy.deepcopy(lstm).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert single(torch.randn(5, 2, 3))[0].dtype == torch.bfloat16


def test_wrong_use():
    with pytest.raises(ValueError, match="layer_norm: expected proj_size=0, got 2"):
        fastlstm.LSTM(3, 4, proj_size=2, layer_norm=True)
    lstm = fastlstm.LSTM(3, 4, layer_norm=True)
    weights = list(lstm.parameters())
    with pytest.raises(RuntimeError, match="expected 8 weights for these options, got 4"):
        fastlstm.functional.lstm(torch.randn(2, 1, 3), None, weights[:4], layer_norm=True)
    wrong = [*weights[:6], weights[4], weights[7]]
    with pytest.raises(RuntimeError, match=r"norm_c_l0 must have shape \(4,\), got \(16,\)"):
        fastlstm.functional.lstm(torch.randn(2, 1, 3), None, wrong, layer_norm=True)
    with pytest.raises(NotImplementedError, match="layer_norm needs fastlstm's kernels"):
        lstm.to(torch.complex64)(torch.randn(2, 1, 3, dtype=torch.complex64))
