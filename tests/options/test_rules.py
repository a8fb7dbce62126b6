"""What cells do beyond nn.LSTM's: recurrent dropout, zoneout of h and c, a bound on c."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from benchmarks.problems import Problem, assert_matches_reference
from fastlstm.modules import extra_options
from fastlstm.reference import dropout_mask
from fastlstm.stack import Stack

RULES = {
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "zoneout of h": {"zoneout_h": 0.4},
    "zoneout of c": {"zoneout_c": 0.4},
    "clip": {"cell_clip": 0.2},
    "all": {"recurrent_dropout": 0.2, "zoneout_h": 0.3, "zoneout_c": 0.4, "cell_clip": 0.5},
}
UPDATE, ZONE_C, ZONE_H = 1, 2, 3  # dropout_mask's streams


def by_hand(lstm, x, seed):
    """One layer, one direction, from the definition: outputs and cells, step by step."""
    steps, batch, _ = x.shape
    units, own = lstm.hidden_size, extra_options(lstm)
    zoneout_h, zoneout_c = own.get("zoneout_h", 0.0), own.get("zoneout_c", 0.0)
    h = c = x.new_zeros(batch, units)
    outputs, cells = [], []
    b = torch.arange(batch)
    for t in range(steps):

        def keeps(p, stream, t=t):
            mask = dropout_mask(seed, 0, 0, torch.full((batch,), t), b, units, p, stream)
            return mask.to(x.dtype)

        a = x[t] @ lstm.weight_ih_l0.t() + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.t()
        i, f, g, o = (a + lstm.bias_hh_l0).chunk(4, -1)
        update = g.tanh()
        if own.get("recurrent_dropout") and lstm.training:
            p = own["recurrent_dropout"]
            update = update * keeps(p, UPDATE) / (1 - p)
        new_c = f.sigmoid() * c + i.sigmoid() * update
        if "cell_clip" in own:
            new_c = new_c.clamp(-own["cell_clip"], own["cell_clip"])
        new_h = o.sigmoid() * new_c.tanh()
        if lstm.training:
            c = torch.where(keeps(zoneout_c, ZONE_C) > 0, new_c, c)
            h = torch.where(keeps(zoneout_h, ZONE_H) > 0, new_h, h)
        else:
            c = (1 - zoneout_c) * new_c + zoneout_c * c
            h = (1 - zoneout_h) * new_h + zoneout_h * h
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), torch.stack(cells)


def call(lstm, x, seed, **more):
    return fastlstm.functional.lstm(
        x, None, list(lstm.parameters()), seed=seed, training=lstm.training,
        num_layers=lstm.num_layers, bidirectional=lstm.bidirectional, **extra_options(lstm), **more,
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_what_the_papers_say(name, training):
    lstm = fastlstm.LSTM(3, 21, **RULES[name]).double().train(training)
    x, seed = torch.randn(9, 4, 3, dtype=torch.float64), torch.tensor([77])
    output, (h_n, c_n), cells = call(lstm, x, seed, return_cells=True)
    outputs, expected = by_hand(lstm, x, seed)
    torch.testing.assert_close(output, outputs)
    torch.testing.assert_close(cells[0], expected)
    torch.testing.assert_close(h_n[0], outputs[-1])
    torch.testing.assert_close(c_n[0], expected[-1])
    plain = fastlstm.LSTM(3, 21).double()
    plain.load_state_dict(lstm.state_dict())
    only_drawn = not training and name == "recurrent dropout"
    assert torch.allclose(plain(x)[0], output) == only_drawn


@pytest.mark.parametrize("hidden", [1, 7, 16, 129])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_odd_sizes_match_the_reference(hidden, training, instruction_set):
    rules = dict(RULES["all"])
    if not training:
        rules["recurrent_dropout"] = 0.0
    for batch, steps in ((1, 3), (3, 1), (13, 5)):
        assert_matches_reference(
            Problem(hidden_size=hidden, batch=batch, steps=steps, training=training, **rules)
        )


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_at_their_ends(p):
    lstm = fastlstm.LSTM(3, 5, zoneout_h=p, zoneout_c=p, recurrent_dropout=p)
    x, hx = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    output, state = lstm(x, hx)
    if p == 1:  # nothing ever moves
        assert torch.equal(output, hx[0].expand(4, 2, 5))
        assert torch.equal(state[1], hx[1])
    else:
        assert repr(lstm) == "fastlstm.LSTM(3, 5)"


def test_how_often_it_is_drawn():
    lstm = fastlstm.LSTM(3, 300, zoneout_h=0.3)
    output, _ = lstm(torch.randn(20, 8, 3))
    kept = (output[1:] == output[:-1]).double().mean()
    assert abs(kept - 0.3) < 0.02


def test_drawn_from_the_default_generator():
    lstm, x = fastlstm.LSTM(3, 30, zoneout_c=0.5), torch.randn(5, 2, 3)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(lstm(x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_threads_change_nothing():
    lstm = fastlstm.LSTM(5, 70, 2, bidirectional=True, **RULES["all"])
    x, before = torch.randn(11, 9, 5), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            output, _ = lstm(x)
            results.append([output, *torch.autograd.grad(output.sum(), list(lstm.parameters()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_derivatives(name):
    lstm = fastlstm.LSTM(2, 3, 2, **RULES[name]).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([5])

    def run(x, *weights):
        output, (h_n, c_n) = fastlstm.functional.lstm(
            x, None, weights, num_layers=2, training=True, seed=seed, **RULES[name]
        )
        return output, h_n, c_n

    given = (x, *lstm.parameters())
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_samples_at_once_in_evaluation():
    lstm = fastlstm.LSTM(3, 4, **RULES["all"]).eval()
    x = torch.randn(3, 5, 2, 3)
    found = torch.func.vmap(lambda x: lstm(x)[0])(x)
    torch.testing.assert_close(found, torch.stack([lstm(each)[0] for each in x]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_compiled_graph(training):
    lstm, x = fastlstm.LSTM(3, 4, 2, **RULES["all"]).train(training), torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = compiled(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(found, lstm(x)[0])


def test_rules_with_lengths_and_packed_input():
    lstm = fastlstm.LSTM(3, 6, 2, bidirectional=True, **RULES["all"]).eval()
    x, lengths = torch.randn(7, 4, 3), [3, 7, 1, 5]
    output, (h_n, c_n), cells = lstm(x, lengths=lengths, return_cells=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    others, state, packed_cells = lstm(packed, return_cells=True)
    torch.testing.assert_close(pad_packed_sequence(others)[0], output)
    torch.testing.assert_close(pad_packed_sequence(packed_cells)[0].movedim(2, 0), cells)
    torch.testing.assert_close(state, (h_n, c_n))
    for b, n in enumerate(lengths):
        alone, hx, own = lstm(x[:n, b : b + 1], return_cells=True)
        torch.testing.assert_close(output[:n, b : b + 1], alone)
        torch.testing.assert_close(cells[:, :n, b : b + 1], own)
        torch.testing.assert_close(h_n[:, b : b + 1], hx[0])
    # What the host has not read runs another way, to the same end.
    unread = torch.func.vmap(
        lambda n: lstm(x, lengths=n, return_cells=True)[2], randomness="error"
    )(torch.tensor([lengths]))
    torch.testing.assert_close(unread[0], cells)


def test_unread_lengths_refuse_what_would_draw_otherwise():
    lstm, x = fastlstm.LSTM(3, 6, zoneout_h=0.1), torch.randn(7, 4, 3)
    with pytest.raises(NotImplementedError, match="expected lengths on the CPU"):
        torch.func.vmap(lambda n: lstm(x, lengths=n)[0], randomness="same")(
            torch.tensor([[3, 7, 1, 5]])
        )


def test_recomputation_under_rules():
    plain = fastlstm.LSTM(5, 6, 2, zoneout_c=0.3, cell_clip=0.4).eval()
    lean = fastlstm.LSTM(5, 6, 2, zoneout_c=0.3, cell_clip=0.4, checkpoint_every=3).eval()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(8, 2, 5)
    grads = [torch.autograd.grad(m(x)[0].sum(), list(m.parameters())) for m in (plain, lean)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_text_is_drawn_as_in_evaluation(weights):
    lstm = fastlstm.LSTM(11, 24, 2, **RULES["all"])
    decoder = nn.Linear(24, 11)
    with torch.no_grad():
        for p in (*lstm.parameters(), *decoder.parameters()):
            p.mul_(3)
            if weights == "bf16":  # numbers that rounding leaves alone
                p.copy_(p.bfloat16())
    prime = torch.randint(11, (4, 3))
    packed = fastlstm.prepack(lstm, decoder, weights)
    packed = pickle.loads(pickle.dumps(packed))
    tokens, (h_n, c_n) = fastlstm.generate(packed, None, prime, 12, temperature=0)
    lstm.eval()
    with torch.no_grad():
        output, hx = lstm(torch.cat((prime, tokens[:-1])))
    logits = decoder(output[3:])
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 1e-4
    torch.testing.assert_close((h_n, c_n), hx, atol=1e-5, rtol=1e-5)


def test_rules_are_no_reason_to_leave_the_chip():
    for rules in ({}, {"zoneout_h": 0.1, "recurrent_dropout": 0.2, "cell_clip": 3.0}):
        lstm = fastlstm.LSTM(256, 256, dtype=torch.bfloat16, **rules)
        found = fastlstm.explain(lstm, 16, 100, gpu="H200")
        assert (found.algorithm, found.backward_algorithm) == ("cluster", "cluster")


def test_rules_are_kept_shown_and_not_converted():
    lstm = fastlstm.LSTM(3, 4, zoneout_h=0.1, cell_clip=3.0)
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert twin.stack == Stack(3, 4, zoneout_h=0.1, cell_clip=3.0)
    assert repr(lstm) == "fastlstm.LSTM(3, 4, zoneout_h=0.1, cell_clip=3.0)"
    with pytest.raises(ValueError, match=r"^module: nn.LSTM has no zoneout_h"):
        fastlstm.to_torch(lstm)
    with pytest.raises(NotImplementedError, match="zoneout_h, zoneout_c and cell_clip need"):
        lstm.to(torch.complex64)(torch.randn(2, 1, 3, dtype=torch.complex64))


def test_an_option_can_change_while_one_trains():
    lstm, x = fastlstm.LSTM(3, 4, zoneout_h=0.5).eval(), torch.randn(5, 2, 3)
    lstm.zoneout_h = 0.25
    other = fastlstm.LSTM(3, 4, zoneout_h=0.25).eval()
    other.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], other(x)[0])


def test_an_option_that_changes_is_checked():
    x = torch.randn(5, 2, 3)
    for option, value, wrong, says in (
        ("zoneout_h", 0.5, 2.0, r"zoneout_h should be a number in range \[0, 1\], got 2.0"),
        ("weight_dropout", 0.5, -1, "weight_dropout should be a number"),
        ("cell_clip", 1.0, -1.0, "cell_clip should be a positive number or None, got -1.0"),
        ("checkpoint_every", 2, 0, "checkpoint_every should be a number of steps or None, got 0"),
    ):
        lstm = fastlstm.LSTM(3, 4, **{option: value})
        lstm(x)
        setattr(lstm, option, wrong)
        with pytest.raises(ValueError, match=says):
            lstm(x)


@pytest.mark.parametrize("base", [nn.LSTM, fastlstm.LSTM])
def test_subclasses_may_call_their_own_by_these_names(base):
    class Own(base):
        def __init__(self):
            super().__init__(3, 4)
            self.layer_norm = nn.LayerNorm(4)
            self.weight_dropout = nn.Dropout(0.5)
            self.stack = nn.Linear(4, 4)
            self.zoneout_h, self.checkpoint_every = "theirs", 3

        def forward(self, x):
            return self.stack(self.layer_norm(super().forward(x)[0]))

    own = Own()
    assert own(torch.randn(5, 2, 3)).shape == (5, 2, 4)
    assert len(list(own.parameters())) == 8
    assert "theirs" not in repr(own)


@pytest.mark.parametrize("value", ["0.1", [0.1]])
@pytest.mark.parametrize(
    "option", ["recurrent_dropout", "zoneout_h", "zoneout_c", "cell_clip", "weight_dropout"]
)
def test_what_is_no_number_is_named(option, value):
    with pytest.raises(
        TypeError, match=f"{option} should be a .*number .* got {re.escape(repr(value))}"
    ):
        fastlstm.LSTM(3, 4, **{option: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout should be a number in range \[0, 1\], g"),
        ({"zoneout_h": 1.1}, r"zoneout_h should be a number in range \[0, 1\], got 1.1"),
        ({"zoneout_c": float("nan")}, r"zoneout_c should be a number in range \[0, 1\], got nan"),
        ({"cell_clip": 0.0}, "cell_clip should be a positive number or None, got 0.0"),
        ({"cell_clip": float("nan")}, "cell_clip should be a positive number or None, got nan"),
        ({"zoneout_h": 0.1, "proj_size": 2}, "zoneout: expected proj_size=0, got 2"),
    ],
    ids=str,
)
def test_wrong_rules(options, says):
    with pytest.raises(ValueError, match=says):
        fastlstm.LSTM(3, 4, **options)
    lstm = fastlstm.LSTM(3, 4, proj_size=options.get("proj_size", 0))
    with pytest.raises(ValueError, match=says):
        fastlstm.functional.lstm(torch.randn(2, 1, 3), None, list(lstm.parameters()), **options)
