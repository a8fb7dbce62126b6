"""Text drawn by the CUDA kernels, run by the emulator: the CPU's text, whatever the schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from simt_checks import NEEDED, NO_BUG, is_seen, plant, sanitize
from simt_library import ORDERS, KernelError
from simt_text import Schedule, Writer, load, make
from torch import nn

import fastlstm
from fastlstm.generation.draw import Draw, choose, noise
from fastlstm.generation.generate import _module, run
from fastlstm.generation.packed_weights import pack, rounded
from fastlstm.ops.native import _C

pytestmark = NEEDED

SEED = torch.tensor([2**40 + 11])
DRAWS = {
    "greedy": Draw(0.0),
    "free": Draw(1.0, seed=SEED),
    "cool": Draw(0.6, seed=SEED),
    "top-k": Draw(1.0, 3, seed=SEED),
    "nucleus": Draw(1.2, None, 0.8, SEED),
    "both": Draw(1.0, 4, 0.9, SEED),
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def model(vocabulary=9, hidden=7, layers=2, batch=3, scale=2.0, steps=3, states=True, **rules):
    """A model, large enough weights that its text is no constant, and what is asked of it."""
    torch.manual_seed(vocabulary + 10 * hidden + 100 * layers + 1000 * batch)
    lstm = fastlstm.LSTM(vocabulary, hidden, layers, **rules)
    decoder = nn.Linear(hidden, vocabulary)
    with torch.no_grad():
        for p in (*lstm.parameters(), *decoder.parameters()):
            p.mul_(scale)
    shape = (layers, batch, hidden)
    hx = tuple(torch.empty(shape).uniform_(-1, 1) for _ in range(2)) if states else None
    prime = torch.randint(vocabulary, (steps, batch))
    return SimpleNamespace(lstm=lstm, decoder=decoder, prime=prime, hx=hx)


def packed(m, storage="fp32", words=False):
    weights, stack, head = _module(m.lstm, m.decoder)
    return pack(weights, stack, head.weight, head.bias, storage, words)


def text(m, schedule, how, storage="fp32", variant="plain", length=10, offset=0, library=None):
    writer = Writer(library or load(variant), schedule)
    found = writer.text(packed(m, storage), m.prime, length, m.hx, how, offset)
    assert writer.races == 0, writer.first_race
    return found


def cpu_text(m, how, length=10, offset=0):
    return run(packed(m, words=True), None, m.prime, length, m.hx, how, offset)


def assert_same_text(found, expected, tolerance=1e-5):
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).abs().max() <= tolerance


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


SIZES = {
    "one of everything": {"vocabulary": 1, "hidden": 1, "layers": 1, "batch": 1, "steps": 1},
    "three": {"vocabulary": 3, "hidden": 3, "layers": 1, "batch": 2, "steps": 2},
    "seven": {"vocabulary": 17, "hidden": 7, "layers": 3, "batch": 3},
    "a CTA without a unit of its own": {"hidden": 33, "batch": 1},
    "eight layers": {"hidden": 5, "layers": 8, "batch": 2},
    "zero states": {"hidden": 12, "states": False},
    "a long prime": {"hidden": 9, "layers": 1, "steps": 21},
    "129": {"vocabulary": 65, "hidden": 129, "layers": 2, "batch": 8, "steps": 1},
    "more tokens than a warp polls at once": {"vocabulary": 150, "hidden": 20, "batch": 2},
    "more decoder tiles than CTAs": {"vocabulary": 300, "hidden": 20, "layers": 1, "batch": 2},
}


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("name", SIZES)
def test_float32_text_is_the_cpus(name, how):
    m, how = model(**SIZES[name]), DRAWS[how]
    assert_same_text(text(m, Schedule(), how, length=6), cpu_text(m, how, length=6))


@pytest.mark.parametrize(("units", "tiles"), [(4, 2), (8, 1), (16, 2), (32, 1)])
def test_every_float32_shape_draws_the_same(units, tiles):
    m, how = model(20, 40, 2, 11), DRAWS["both"]
    schedule = Schedule(units=units, tiles=tiles)
    assert_same_text(text(m, schedule, how), cpu_text(m, how))


def half_reference(m, storage, tokens):
    """Logits (of the steps that draw) and states in float64 with h rounded in every step."""
    dtype, layers = HALF[storage], m.lstm.num_layers
    weights = [rounded(p.detach(), storage).double() if p.dim() == 2 else p.detach().double()
               for p in m.lstm.parameters()]  # fmt: skip
    weights[0] = m.lstm.weight_ih_l0.detach().double()  # the table
    head = rounded(m.decoder.weight.detach(), storage).double()
    h, c = (x.double() for x in m.hx)
    h, c, logits = h.to(dtype).double(), c.clone(), []
    for s, inputs in enumerate(torch.cat((m.prime, tokens[:-1]))):
        x = nn.functional.one_hot(inputs, m.lstm.input_size).double()
        for layer in range(layers):
            w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
            z = x @ w_ih.t() + h[layer] @ w_hh.t() + b_ih + b_hh
            i, f, g, o = z.chunk(4, -1)
            c[layer] = f.sigmoid() * c[layer] + i.sigmoid() * g.tanh()
            h[layer] = x = (o.sigmoid() * c[layer].tanh()).to(dtype).double()
        if s >= len(m.prime) - 1:
            logits.append(x @ head.t() + m.decoder.bias.double())
    return torch.stack(logits), (h, c)


# Where a state lies between two numbers of the type, the sums' order decides which it becomes.
TOLERANCE = {"bf16": 0.03, "fp16": 4e-3, "int8": 0.03}


@pytest.mark.parametrize("storage", HALF)
@pytest.mark.parametrize(
    ("units", "tiles", "batch"), [(4, 1, 5), (4, 8, 59), (8, 4, 25), (16, 2, 9), (32, 1, 8)]
)
def test_half_types_take_the_likeliest_token_of_rounded_states(storage, units, tiles, batch):
    m = model(20, 33, 2, batch, scale=1.5)
    tokens, states = text(m, Schedule(units=units, tiles=tiles), DRAWS["greedy"], storage)
    logits, expected = half_reference(m, storage, tokens)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() <= TOLERANCE[storage]
    for a, b in zip(states, expected, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[storage]
    assert len(tokens.unique()) > 1


@pytest.mark.parametrize("how", ["free", "top-k", "nucleus", "both"])
@pytest.mark.parametrize(("tiles", "batch"), [(1, 8), (2, 16), (4, 32), (8, 64)])
def test_teams_of_lanes_draw_what_torch_draws(how, tiles, batch):
    """From a reference's logits after the same text; one in a hundred may lie at an edge."""
    m = model(20, 33, 2, batch)
    tokens, _ = text(m, Schedule(tiles=tiles), DRAWS[how], "fp16")
    logits, _ = half_reference(m, "fp16", tokens)
    numbers = noise(SEED, 0, *logits.shape, torch.device("cpu"))
    chosen = zip(logits, numbers, strict=True)
    expected = torch.stack([choose(x, DRAWS[how], number) for x, number in chosen])
    assert (tokens != expected).float().mean() <= 0.0125  # one of 80


def constant(logits, hidden=1):
    """A model whose logits are always these, and one row."""
    m = model(len(logits), hidden, 1, 1, steps=1)
    with torch.no_grad():
        m.decoder.weight.zero_()
        m.decoder.bias.copy_(torch.tensor(logits))
    return m


def test_float_noise_is_accurate_at_both_ends():
    """For the least and the most noise among many draws of two tokens."""
    values = noise(SEED, 0, 200_000, 1, 2, torch.device("cpu"))[:, 0]
    order = values.flatten().argsort()
    for j in (*order[:4], *order[-4:]):
        number = int(j) // 2
        difference = (values[number, 1] - values[number, 0]).item()
        for margin in (1e-5, -1e-5):
            m, how = constant([difference + margin, 0.0]), DRAWS["free"]
            tokens, _ = text(m, Schedule(), how, length=1, offset=number)
            assert tokens.item() == (0 if margin > 0 else 1)


@pytest.mark.parametrize("tiles", [1, 2, 4, 8])
def test_of_equal_logits_the_first_is_taken(tiles):
    logits = [-1.0] * 140
    for j in (37, 38, 130, 139):
        logits[j] = 0.0
    logits[37] = -0.0
    m, schedule = constant(logits, hidden=64), Schedule(tiles=tiles)
    tokens, _ = text(m, schedule, DRAWS["greedy"], "bf16", length=3)
    assert (tokens == 37).all()


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_text_does_not_depend_on_the_schedule(storage):
    m, how = model(20, 33, 2, 9), DRAWS["both"]
    first = text(m, Schedule("fifo"), how, storage, length=6)
    for seed, order in enumerate((*ORDERS, "random", "random")):
        assert_equal(text(m, Schedule(order, seed), how, storage, length=6), first)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_rows_text_does_not_depend_on_the_others(storage):
    """Nor on the shape of the kernel, whose tiles follow the batch."""
    m = model(20, 33, 2, 16)
    whole, states = text(m, Schedule(tiles=2), DRAWS["greedy"], storage)
    for row in (0, 9, 15):
        one = replace_rows(m, slice(row, row + 1))
        tokens, ends = text(one, Schedule(units=8, tiles=1), DRAWS["greedy"], storage)
        assert torch.equal(tokens[:, 0], whole[:, row])
        assert all(torch.equal(a[:, 0], b[:, row]) for a, b in zip(ends, states, strict=True))


def replace_rows(m, rows):
    hx = tuple(x[:, rows].contiguous() for x in m.hx)
    return SimpleNamespace(**{**vars(m), "prime": m.prime[:, rows].contiguous(), "hx": hx})


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("how", ["greedy", "both"])
def test_a_second_call_goes_on_where_the_first_ended(storage, how):
    m, how = model(20, 33, 2), DRAWS[how]
    whole, end = text(m, Schedule(), how, storage, length=12)
    first, hx = text(m, Schedule(), how, storage, length=5)
    rest = SimpleNamespace(**{**vars(m), "prime": first[-1:], "hx": hx})
    second = text(rest, Schedule(), how, storage, length=7, offset=5)
    assert_equal((torch.cat((first, second[0])), second[1]), (whole, end))


@pytest.mark.parametrize("active", [1, 2, 3])
def test_groups_of_a_large_batch_run_side_by_side_or_in_turn(active):
    m, how = model(20, 9, 2, 21), DRAWS["free"]
    writer = Writer(load("plain"), Schedule(active=active))
    found = writer.text(packed(m), m.prime, 10, m.hx, how)
    assert_same_text(found, cpu_text(m, how))
    launches = 2 * -(-3 // active)  # a kernel, and before it the exchange set to zero
    assert (writer.launches, writer.largest_grid) == (launches, active * 8)


def test_cells_are_clipped_and_zoned_out_as_on_the_cpu():
    m, how = model(20, 12, 2, zoneout_c=0.3, cell_clip=0.4), DRAWS["free"]
    found = text(m, Schedule(), how)
    assert_same_text(found, cpu_text(m, how))
    assert found[1][1].abs().max() <= 1


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("unit", [0, 1, 6])
def test_not_a_number_stays_one_and_hangs_nothing(storage, unit):
    """In the first layer's states of row 1, whose every number it then is; not of the others."""
    m = model(9, 7, 2, 3)
    for x in m.hx:
        x[0, 1, unit] = torch.nan
    tokens, (h_n, c_n) = text(m, Schedule(), DRAWS["both"], storage)
    assert h_n[:, 1].isnan().all()
    assert c_n[:, 1].isnan().all()
    assert h_n[:, [0, 2]].isfinite().all()
    assert ((tokens >= 0) & (tokens < 9)).all()


def test_infinite_logits_choose_a_token_that_is_one():
    m = model(9, 7, 1, 2)
    with torch.no_grad():
        m.decoder.bias[4] = torch.inf
    tokens, _ = text(m, Schedule(), DRAWS["free"])
    assert (tokens == 4).all()


@pytest.mark.parametrize("how", DRAWS)
def test_logits_of_minus_infinity_are_never_drawn(how):
    m = model(9, 7, 1, 8)
    with torch.no_grad():
        m.decoder.bias[::2] = -torch.inf
    tokens, _ = text(m, Schedule(), DRAWS[how], "bf16", length=20)
    assert (tokens % 2 == 1).all()


@pytest.mark.parametrize(("temperature", "distinct"), [(1e-300, 1), (1e300, 9)])
def test_temperatures_beyond_floats_range(temperature, distinct):
    """The likeliest token, or every token as often."""
    tokens, _ = text(
        constant([0.0] * 8 + [1.0]), Schedule(), Draw(temperature, seed=SEED), "bf16", length=60
    )
    assert len(tokens.unique()) == distinct


@pytest.mark.parametrize("token", [-1, 9, 2**40])
def test_a_token_outside_the_vocabulary_reads_no_foreign_memory(token):
    m = model(9, 7, 1, 2)
    m.prime[0, 0] = token
    assert text(m, Schedule(), DRAWS["greedy"])[0].shape == (10, 2)


@pytest.mark.parametrize("preempt", [0, 50])
@pytest.mark.parametrize(("storage", "tiles"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 8)])
def test_no_races(storage, tiles, preempt):
    for layers, order in ((1, "random"), (2, "block_down"), (3, "random")):
        m = model(20, 33, layers, 8 * tiles - 3)
        units = 16 if tiles < 4 else 4
        schedule = Schedule(order, races=True, preempt=preempt, units=units, tiles=tiles)
        text(m, schedule, DRAWS["both"], storage, "race", length=6)


def test_address_sanitizer_finds_nothing():
    sanitize(
        "from test_emulated_generate import *\n"
        "for storage in ('fp32', 'bf16'):\n"
        "  for sizes in SIZES.values():\n"
        "    text(model(**sizes), Schedule(), DRAWS['both'], storage, 'asan', length=3)\n"
        "    print('right: ', storage, sizes)\n",
        right=2 * len(SIZES),
        build=make,
    )


# ---- which models run, and how ----


def plan(hidden, layers, vocabulary, batch, bytes_each=2, gpu="H200"):
    capability, sms, shared = fastlstm.algorithms.GPUS[gpu]
    return _C.generate_plan(
        element_bytes=bytes_each, hidden_size=hidden, layers=layers, vocabulary=vocabulary,
        batch=batch, capability=capability, sms=sms, shared_per_block=shared,
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_two_layers_of_512_stay_on_the_chip(gpu, bytes_each, batch):
    found = plan(512, 2, 65, batch, bytes_each, gpu)
    if (gpu, bytes_each) == ("A100", 4):  # 108 SMs of 163 KB
        assert found["reason"] == "the weights do not fit the multiprocessors' shared memory"
        return
    _, sms, shared = fastlstm.algorithms.GPUS[gpu]
    assert found["reason"] is None
    assert found["ctas"] * found["active"] <= sms
    assert found["shared"] <= shared
    assert found["groups"] * found["columns"] >= batch


@pytest.mark.parametrize(
    ("sizes", "gpu", "reason"),
    [
        ((2048, 2, 65), "H200", "the weights do not fit"),
        ((512, 9, 65), "H200", "more than 8 layers"),
        ((64, 1, 5000), "H200", "the vocabulary exceeds 1024"),
        ((64, 1, 65), "T4", "older than sm_80"),
    ],
)
def test_what_does_not_run_says_why(sizes, gpu, reason):
    assert reason in plan(*sizes, 1, gpu=gpu)["reason"]


def test_small_models_run_groups_side_by_side():
    found = plan(128, 2, 65, 64)
    assert found["active"] == found["groups"] > 1


def test_the_planner_runs_what_it_plans():
    m, how = model(20, 33, 2, 19), DRAWS["both"]
    assert_same_text(text(m, Schedule(units=0), how), cpu_text(m, how))


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(KernelError, match="older than sm_80"):
        text(model(), Schedule(units=0, capability=75), DRAWS["free"])


# ---- planted bugs ----

# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "a phase that does not toggle": (
        "generate/words.cuh", "n / slots % 2 == 0", "n >= 0", "return n / slots % 2 == 0 ?",
    ),
    "one slot for h": (
        "generate/kernel.cuh", "s % 2", "0", "+ (2 * layer + s % 2) * layout_",
    ),
    "h of the step before": (
        "generate/kernel.cuh",
        "slot(layer, s)",
        "slot(layer, s > 0 ? s - 1 : s)",
        "? slot(layer, s) + ((slab",
    ),
    "one buffer of partial sums": (
        "generate/cta.cuh", "buffer * layout.partial_bytes", "0",
    ),
    "partial sums not barred": (
        "generate/kernel.cuh",
        "__syncthreads();",
        "",
        "multiply(cta_.hh_matrix(layer), layout_.unit_tiles, b, 1);\n    __syncthreads();",
    ),
    "no barrier where no logits are drawn": (
        "generate/kernel.cuh", "__syncthreads();", "",
        "__syncthreads();  // the previous layer's partial sums",
    ),
    "a draw from the logits of another row": (
        "generate/kernel.cuh",
        "column",
        "(column ^ 1) % cta_.rows",
        "const float* row = logits_ + column * layout_.characters;",
    ),
    "tokens not barred": (
        "generate/kernel.cuh", "__syncthreads();", "",
        "    }\n    __syncthreads();\n  }\n  // Behind what",
    ),
    "not all words of a packet are awaited": (
        "generate/words.cuh", "(v.w ^ phase)", "0", "| (v.w ^ phase)) &",
    ),
    "one noise for all draws": (
        "generate/kernel.cuh", "args_.choice.offset + drawn", "args_.choice.offset",
        "args_.choice.offset + drawn, cta_",
    ),
    "noise of the step before": (
        "generate/kernel.cuh", "begin_logits(drawn);", "begin_logits(drawn - 1);",
    ),
    "a draw of a character that only fills a tile": (
        "generate/load.cuh", "-INFINITY", "9.0f", "decoder_bias[character] : -INFINITY",
    ),
    "exchange not reset": (
        "generate/host.cuh", "groups * plan.layout.exchange_bytes", "0",
    ),
}  # fmt: skip


ONLY = [("generate/kernel.cuh", "TextGroup<Shape>(args, shared).run();", "Shape::kTiles == 1")]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return plant(MUTANTS, folder, make, kinds="generate", only=ONLY)


def draws_wrongly(library):
    """Whether a planted bug shows: as an error, a race or another text."""
    how, wrong = DRAWS["free"], False
    for layers, seed in ((1, 1), (2, 2), (2, 3)):
        m = model(20, 33, layers, 3)
        schedule = Schedule(seed=seed, races=True, preempt=50, units=16)
        expected = text(m, Schedule(units=16), how, "bf16", length=8)
        writer = Writer(library, schedule)
        try:
            tokens, ends = writer.text(packed(m, "bf16"), m.prime, 8, m.hx, how)
        except KernelError:
            return True
        wrong = wrong or writer.races > 0 or not torch.equal(tokens, expected[0])
        wrong = wrong or not all(torch.equal(a, b) for a, b in zip(ends, expected[1], strict=True))
    return wrong


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_planted_bug_is_seen(name, mutants):
    assert is_seen(mutants[name], "test_emulated_generate", "draws_wrongly") == (name != NO_BUG)
