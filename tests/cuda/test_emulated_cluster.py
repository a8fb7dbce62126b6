"""The forward kernels in thread-block clusters, run by the emulator; stepwise runs backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_checks import NEEDED, NO_BUG, assert_matches, is_seen, plant, problems_of, sanitize
from simt_library import ORDERS, Emulated, KernelError, Schedule, load, plan

from benchmarks.problems import OPTIONS, TOLERANCE, Problem, make
from fastlstm import reference

pytestmark = NEEDED

# Everything but a projection.
CLUSTERED = {
    name: fields | {"proj_size": 0}
    for name, fields in OPTIONS.items()
    if "projection" not in name
}  # fmt: skip
HALF = [torch.bfloat16, torch.float16]
# CTAs and units of one, and an H that leaves some of them without a unit.
CLUSTERS = {(1, 64): 33, (2, 64): 65, (4, 32): 100, (8, 32): 129, (16, 32): 264}
TF32_CLUSTERS = {(1, 64): 64, (4, 32): 70, (8, 32): 131}
STREAMED = (16, 48)  # of half types; of tf32 (16, 32)
TF32 = 2e-3  # how far tf32's rounding takes results from float64's


def clustered(order="random", **more):
    more.setdefault("backward_algorithm", "stepwise")
    return Schedule(order, algorithm="cluster", allow_tf32=True, **more)


def forward(p, schedule, saves=True, change=lambda x: None):
    """Outputs of a forward pass alone; `change` may change the tensors before."""
    x = make(p)
    with torch.no_grad():
        change(x)
    emulated = Emulated(load("plain"), schedule, saves=saves)
    with torch.no_grad():
        return emulated.lstm(*x.arguments), emulated


def assert_close(outputs, p, tolerance):
    with torch.no_grad():
        expected = reference.lstm(*make(p).to(torch.float64).arguments)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm(), p


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLUSTERED)
def test_cluster_kernels_match_the_reference(name, dtype):
    tolerance = TF32 if dtype == torch.float32 else 0
    assert_matches(Problem(dtype=dtype, **CLUSTERED[name]), clustered(), tolerance=tolerance)


@pytest.mark.parametrize(
    ("ctas", "units", "sequences"), [(1, 64, 4), *((*c, n) for c in CLUSTERS for n in (8, 16))]
)
def test_every_cluster_at_an_odd_size(ctas, units, sequences):
    """More steps than are loaded ahead, two groups, sequences that end or enter on the way."""
    hidden = CLUSTERS[ctas, units]
    p = Problem(hidden_size=hidden, batch=19, steps=11, packed=True, dtype=torch.bfloat16)
    assert_matches(p, clustered(ctas=ctas, units=units, sequences=sequences))


@pytest.mark.parametrize(("ctas", "units"), TF32_CLUSTERS)
def test_every_cluster_in_tf32(ctas, units):
    hidden = TF32_CLUSTERS[ctas, units]
    p = Problem(hidden_size=hidden, batch=9, steps=10, bidirectional=True)
    for sequences in (4, 8, 16)[ctas > 1 :]:
        schedule = clustered(ctas=ctas, units=units, sequences=sequences)
        assert_matches(p, schedule, tolerance=TF32)


@pytest.mark.parametrize(
    ("hidden", "batch", "steps", "more"),
    [
        (515, 1, 1, {}),
        (520, 9, 2, {}),
        (576, 9, 3, {"bidirectional": True, "packed": True, "dtype": torch.float16}),
        (768, 5, 3, {"states": True, "dtype": torch.float16}),
        (767, 3, 9, {"zoneout_h": 0.3}),
    ],
)
def test_outputs_of_weights_that_are_streamed_from_shared_memory(hidden, batch, steps, more):
    """H beyond what registers hold. Forward alone, for stepwise's backward would take minutes."""
    fields = {"dtype": torch.bfloat16} | more
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, **fields)
    assert_close(forward(p, clustered())[0], p, TOLERANCE[p.dtype])


@pytest.mark.parametrize(("hidden", "batch", "steps"), [(260, 1, 3), (384, 9, 2), (512, 3, 9)])
def test_outputs_of_streamed_weights_in_tf32(hidden, batch, steps):
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, bidirectional=True)
    assert_close(forward(p, clustered())[0], p, TF32)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(STREAMED, torch.bfloat16), ((16, 32), torch.float32)], ids=str
)
@pytest.mark.parametrize("hidden", [56, 99])
def test_what_streamed_kernels_save(shape, dtype, hidden):
    """In more steps than are loaded ahead; most CTAs have no unit."""
    rules = {"recurrent_dropout": 0.2, "zoneout_c": 0.4}
    p = Problem(hidden_size=hidden, batch=11, steps=9, packed=True, dtype=dtype, **rules)
    schedule = clustered(ctas=shape[0], units=shape[1], sequences=8)
    assert_matches(p, schedule, tolerance=TF32 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("hidden", [1, 3, 7, 64, 65, 129])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 2), (7, 3), (33, 1)])
def test_odd_sizes_in_clusters(hidden, batch, steps):
    p = Problem(hidden_size=hidden, batch=batch, steps=steps, bidirectional=True)
    assert_matches(replace(p, dtype=torch.bfloat16), clustered())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rules_of_cells_in_groups_of_packed_sequences(bidirectional):
    rules = {"recurrent_dropout": 0.2, "zoneout_h": 0.3, "zoneout_c": 0.4}
    p = Problem(hidden_size=70, batch=19, steps=10, packed=True, dtype=torch.float16, **rules)
    assert_matches(replace(p, bidirectional=bidirectional), clustered(sequences=8))


def test_gradient_of_the_cells_of_every_step_in_clusters():
    p = Problem(hidden_size=72, num_layers=2, batch=9, cells=True, dtype=torch.bfloat16)
    assert_matches(p, clustered())


@pytest.mark.parametrize(("ctas", "units"), [(1, 64), (2, 64)])
def test_cluster_results_do_not_depend_on_the_schedule(ctas, units):
    p = Problem(hidden_size=60, num_layers=2, batch=20, steps=10, dropout=0.4, packed=True)
    runs = [
        assert_matches(
            replace(p, dtype=torch.bfloat16),
            clustered(order, seed=seed, ctas=ctas, units=units, sequences=8),
        )
        for seed, order in enumerate(ORDERS)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_groups_of_either_size_give_the_same_bits():
    p = Problem(hidden_size=100, batch=21, steps=4, dtype=torch.bfloat16)
    small, large = (forward(p, clustered(sequences=n))[0] for n in (8, 16))
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("name", ["three layers", "packed, both directions", "every rule"])
def test_inference_gives_the_bits_of_training(name):
    p = Problem(dtype=torch.bfloat16, **CLUSTERED[name])
    saved, kept = forward(p, clustered())[0], forward(p, clustered(), saves=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(saved[:3], kept[:3], strict=True))


def test_a_layer_is_one_product_and_few_launches():
    """Biases and padded x; for every layer W_ih packed, all steps, and a product a direction."""
    for layers in (1, 3):
        p = Problem(hidden_size=40, num_layers=layers, steps=9, bidirectional=True)
        _, emulated = forward(replace(p, dtype=torch.bfloat16), clustered())
        assert (emulated.launches, emulated.products) == (2 + 2 * layers, 2 * layers)


@pytest.mark.parametrize(("ctas", "units"), [(1, 64), (4, 32)])
def test_nan_stays_in_its_sequence(ctas, units):
    def spoil(x):
        x.input[2, 5] = torch.nan

    p = Problem(hidden_size=60, batch=11, steps=5, dtype=torch.bfloat16)
    schedule = clustered(ctas=ctas, units=units, sequences=8)
    y, spoiled = (forward(p, schedule, change=f)[0][0] for f in (lambda x: None, spoil))
    assert spoiled[2:, 5].isnan().all()
    assert not spoiled[:2].isnan().any()
    others = [b for b in range(11) if b != 5]
    assert torch.equal(spoiled[:, others], y[:, others])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_saturated_gates_are_right(dtype):
    """One reciprocal serves four gates: their divisors may be as large as they like."""

    def enlarge(x):
        x.input *= 1024

    p = Problem(hidden_size=40, batch=5, steps=3, dtype=dtype)
    outputs, _ = forward(p, clustered(), change=enlarge)
    x = make(p).to(torch.float64)
    with torch.no_grad():
        enlarge(x)
        expected = reference.lstm(*x.arguments)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours.double() - theirs).norm() < TOLERANCE[dtype] * theirs.norm()


@settings(max_examples=15, deadline=None)
@given(problems_of(dtype=st.sampled_from(HALF)), st.sampled_from(ORDERS), st.sampled_from([8, 16]))
def test_drawn_problems_run_in_clusters(p, order, sequences):
    schedule = clustered(order, seed=p.random_seed, sequences=sequences)
    assert_matches(replace(p, proj_size=0), schedule, tolerance=2 * TOLERANCE[p.dtype])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"proj_size": 3}, "clusters have no projection"),
        ({"layer_norm": True}, "clusters have no layer normalisation"),
        ({"hidden_size": 769}, "the recurrent weights do not fit a cluster"),
    ],
)
def test_cluster_kernels_refuse_what_they_have_not(fields, words):
    p = Problem(dtype=torch.bfloat16, **{"steps": 1} | fields)
    with pytest.raises(KernelError, match=f'"cluster" cannot run: {words}'):
        assert_matches(p, clustered())


@pytest.mark.parametrize("seconds", ["0", "0.5", "1e9", ""])
def test_limit_of_a_wait_in_clusters_is_read_from_the_environment(seconds, monkeypatch):
    monkeypatch.setenv("FASTLSTM_WAIT_SECONDS", seconds)
    assert_matches(Problem(dtype=torch.bfloat16), clustered())


@pytest.mark.parametrize("seconds", ["ten", "-1", "nan"])
def test_a_limit_of_clusters_that_is_no_number_of_seconds_is_refused(seconds, monkeypatch):
    monkeypatch.setenv("FASTLSTM_WAIT_SECONDS", seconds)
    expected = f'FASTLSTM_WAIT_SECONDS: expected a number of seconds .* got "{seconds}"'
    with pytest.raises(KernelError, match=expected):
        assert_matches(Problem(dtype=torch.bfloat16), clustered())


@pytest.mark.parametrize(
    ("hidden", "batch", "dtype", "ctas", "sequences"),
    [
        (64, 128, torch.bfloat16, 1, 4),
        (64, 1000, torch.bfloat16, 1, 8),  # when all SMs have groups of eight
        (128, 8, torch.float16, 4, 8),  # two CTAs hold it, four are faster
        (128, 2000, torch.bfloat16, 2, 16),  # until more sequences wait than run
        (256, 16, torch.bfloat16, 8, 8),
        (512, 16, torch.bfloat16, 16, 8),
        (512, 100, torch.bfloat16, 16, 16),
        (513, 1, torch.bfloat16, 16, 8),
        (768, 100, torch.float16, 16, 8),  # streamed: no more registers, no second eight
    ],
)
def test_planner_picks_a_cluster_by_its_steps_and_turns(hidden, batch, dtype, ctas, sequences):
    found = plan(load("plain"), dtype, hidden, batch, algorithm="cluster")
    assert (found.ctas, found.sequences) == (ctas, sequences)
    assert found.ctas * found.units >= hidden


# ---- the race checker and the address sanitizer ----


@pytest.mark.parametrize("name", ["packed, both directions", "dropout", "index", "every rule"])
def test_no_races_in_cluster_kernels(name):
    p = Problem(dtype=torch.bfloat16, **CLUSTERED[name] | {"batch": 18, "steps": 10})
    for order in ("random", "block_down"):
        schedule = clustered(order, races=True, preempt=50, sequences=8)
        assert_matches(p, schedule, "race")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("ctas", "units", "sequences"), [(2, 64, 8), (4, 32, 8), (8, 32, 8), (2, 64, 16), (4, 32, 16)]
)
def test_no_races_in_a_cluster(ctas, units, sequences, order):
    p = Problem(hidden_size=units * ctas - 27, batch=9, steps=5, packed=True, dtype=torch.bfloat16)
    preempt = 50 * (order == "random")
    shape = {"ctas": ctas, "units": units, "sequences": sequences}
    assert_matches(p, clustered(order, races=True, preempt=preempt, **shape), "race")


@pytest.mark.parametrize("order", ["random", "block_down"])
def test_no_races_where_weights_are_streamed(order):
    p = Problem(hidden_size=99, batch=9, steps=6, packed=True, dtype=torch.bfloat16)
    preempt = 50 * (order == "random")
    schedule = clustered(order, races=True, preempt=preempt, ctas=16, units=48, sequences=8)
    assert_matches(p, schedule, "race")


def test_address_sanitizer_finds_nothing_in_clusters():
    sanitize(
        "from test_emulated_cluster import clustered, replace\n"
        "p = Problem(hidden_size=33, num_layers=2, batch=18, dropout=0.5, dtype=torch.bfloat16,\n"
        "            packed=True, steps=9, bidirectional=True)\n"
        "for ctas, units in ((1, 64), (2, 64), (4, 32), (16, 48)):\n"
        "  streamed = (ctas, units) == (16, 48)\n"
        "  one = replace(p, batch=5, num_layers=1, dropout=0.0, bidirectional=False)\n"
        "  q = one if streamed else p  # a group: 16 CTAs are many\n"
        "  for n in (8, 16)[: 2 - streamed]:\n"
        "    assert_matches(q, clustered(ctas=ctas, units=units, sequences=n), 'asan')\n"
        "    print('right:', ctas, n)\n",
        right=7,
    )


# ---- planted bugs ----

_KERNEL, _MOVERS = "cluster/forward.cuh", "cluster/forward_movers.cuh"
_ARMED = (
    "s + 2 < cta.steps)\n"
    "      arrive_expecting(arrived + buffer, Shape::kHiddenBytes / Shape::kParts);"
)
_AWAITED = "if (s > 0) wait(arrived + buffer, (s - 1) >> 1 & 1, args.limit);"
_FILLED = "    wait(cta.filled(turn), turn >> 1 & 1, cta.args.limit);\n"
_LOADED = "    loader.load(turn + Shape::kRing);\n"
_TURNED = "c[1][x] = c[0][x], h[1][x] = h[0][x];\n        c[0][x] = other_c, h[0][x] = other_h;"
_FREED = "    __syncwarp();\n    if (threadIdx.x % 32 == 0) arrive(cta.freed(turn));\n"
# (file of csrc/cuda, its text, the bug): all are in one copy of the kernels, each with a switch.
MUTANTS = {
    "a phase not armed": (_KERNEL, "s + 2 < cta.steps", "false", _ARMED),
    "fewer bytes expected than come": (
        _KERNEL, "Shape::kHiddenBytes", "Shape::kHiddenBytes / 2", _ARMED,
    ),
    "the wrong parity": (_KERNEL, "(s - 1) >> 1 & 1", "s >> 1 & 1"),
    "a parity that does not toggle": (_KERNEL, "(s - 1) >> 1 & 1", "0"),
    "h not waited for": (_KERNEL, _AWAITED, ""),
    "one tile": (_KERNEL, "turn % 2 * Shape::kTileBytes", "0 * Shape::kTileBytes"),
    "one buffer of h": (
        _KERNEL, "buffer * Shape::kHiddenBytes", "0", "buffer * Shape::kHiddenBytes + frag",
    ),
    "one buffer of h for each group": (
        _MOVERS, "unsigned(turn) % kBuffers", "unsigned(turn) % Shape::kGroups",
    ),
    "groups keep their turn": (
        _KERNEL, _TURNED, "",
    ),
    "one buffer of outputs": (_MOVERS, "(turn & 1) * Shape::kSequences", "0 * Shape::kSequences"),
    "sent before all have written": (
        _KERNEL,
        "    compute_barrier<Shape>();\n    if (s + 1 < cta.steps) peers.send(sent, next);\n",
        "    if (s + 1 < cta.steps) peers.send(sent, next);\n    compute_barrier<Shape>();\n",
    ),
    "the last step sends": (
        _KERNEL, "s + 1 < cta.steps", "true", "if (s + 1 < cta.steps) peers.send",
    ),
    "partial sums not barred": (
        "cluster/forward_product.cuh", "named_barrier(2 + block(), 32 * kSplit);", "",
    ),
    "loaded one turn early": (_KERNEL, _FILLED + _LOADED, _LOADED + _FILLED),
    "input part not waited for": (
        _KERNEL, "    wait(cta.loaded(turn), turn / Shape::kRing & 1, args.limit);\n", "",
    ),
    "outputs stored before they are there": (_KERNEL, _FILLED, ""),
    "outputs in a buffer that is not free": (
        _KERNEL, "turn >= 2", "false", "if (turn >= 2) wait(cta.freed(turn)",
    ),
    "a buffer said to be free before it is read": (
        _KERNEL, "    storer.store(turn);\n" + _FREED, _FREED + "    storer.store(turn);\n",
    ),
    "ended sequences go on": (
        _KERNEL, "span[x].enter <= s && s < span[x].leave", "true",
        "if (span[x].enter <= s && s < span[x].leave) {",
    ),
    "another part of h waited for": (
        _KERNEL, "product.part() * cta.kBuffers", "product.part()",
        "? product.part() * cta.kBuffers",
    ),
}  # fmt: skip


ONLY = [
    (
        "cluster/forward_pass.cuh",
        "if (Shape::kCtas == 1)\n",
        "Shape::kCtas == 4 || Shape::kUnits == 48",
    )
]


# Bugs where one CTA works alone.
_ALONE = "cluster/forward_alone.cuh"
ALONE = {
    "input part of the next step not waited for": (
        _ALONE, "try_wait(cta.loaded(following), following / Shape::kRing & 1)", "true",
    ),
    "outputs of a lone CTA in a buffer that is not free": (
        _ALONE, "s < 3", "true", "freed = s < 3 || try_wait",
    ),
    "outputs handed over before all have stored them": (
        _ALONE, "if (thread == 0 && s > 1) arrive(cta.filled(s - 2));",
        "if (thread == 0 && s > 0) arrive(cta.filled(s - 1));",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    kinds = "stepwise cluster_forward"
    return plant(MUTANTS, folder, kinds=kinds, only=ONLY)


@pytest.fixture(scope="module")
def mutants_of_one_cta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    only = [(*ONLY[0][:2], "Shape::kCtas == 1 && Shape::kSequences == 4")]
    return plant(ALONE, folder, kinds="stepwise cluster_forward", only=only)


@pytest.mark.parametrize("name", [*ALONE, NO_BUG])
def test_bug_planted_where_one_cta_works_alone_is_seen(name, mutants_of_one_cta):
    p = Problem(hidden_size=61, batch=7, steps=12, packed=True, dtype=torch.bfloat16)
    schedules = [
        clustered(order, races=True, preempt=50, ctas=1, units=64, sequences=4)
        for order in ("random", "block_down")
    ]
    found = is_seen(mutants_of_one_cta[name], "simt_checks", "shows", [p], schedules)
    assert found == (name != NO_BUG)


@pytest.mark.parametrize("name", [*MUTANTS, NO_BUG])
def test_bug_planted_in_the_cluster_kernels_is_seen(name, mutants):
    p = Problem(hidden_size=99, batch=11, steps=12, packed=True, dtype=torch.bfloat16)
    schedules = [
        clustered(races=True, preempt=50, ctas=ctas, units=units, sequences=sequences)
        for ctas, units, sequences in ((4, 32, 8), (4, 32, 16), (*STREAMED, 8))
    ]
    assert is_seen(mutants[name], "simt_checks", "shows", [p], schedules) == (name != NO_BUG)
