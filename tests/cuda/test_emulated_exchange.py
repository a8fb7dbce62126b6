"""The emulator's clusters, mbarriers, asynchronous copies and packets: what it promises kernels.

Two kernels of tests/cuda/simt have the patterns of the real ones: one in clusters, one over the
grid. They are right under every schedule, and every bug planted in them is seen.
"""

from __future__ import annotations

import ctypes as c
import re
from itertools import pairwise

import pytest
from simt_checks import NEEDED, sanitize
from simt_library import ORDERS, load

pytestmark = NEEDED

SEEDS = range(1, 4)
LATE = ORDERS[1:]  # "fifo" alone delivers at once


def run(
    variant: str, kernel: str, bug: int, way: int, order: str, seed: int
) -> tuple[int, int, str]:
    """What came out (0: right, 1: wrong, 2: an error), the number of races, and the message."""
    races, message = c.c_int64(), c.create_string_buffer(512)
    planted = getattr(load(variant), f"simt_planted_{kernel}")
    outcome = planted(
        bug, way, ORDERS.index(order), c.c_uint64(seed), variant == "race", c.byref(races), message
    )
    return outcome, races.value, message.value.decode()


# ---- clusters ----

# In the order of simt/planted_cluster.cu; what the report must match under every schedule.
PHASE = "may come in the phase before|more arrivals at the mbarrier|more bytes arrive"
IN_CLUSTER = {
    "no bug": "",
    "missing expect": PHASE,
    "wrong parity": f"{PHASE}|deadlock: .* at wait in planted_cluster.cu:",
    "parity that does not toggle": f"{PHASE}|deadlock: .* at wait in planted|may end before",
    "one buffer": f"{PHASE}|sent in phase 0 of .* arrive in phase 1",
    "slot reused one step early": PHASE,
    "exit while peers still write": "exits while copies to or from|may exit before copies have",
    "wait for one half of K": PHASE,
    "too many bytes announced": "deadlock: .*, phase 0 lacks 0 arrivals and 16 bytes",
    "too few bytes announced": f"{PHASE}|sent in phase 0 of .* arrive in phase 1",
    "source overwritten before it was read": "write after read .* bulk stores|copies that the",
    "bulk stores not waited for": "write after read .* the bulk stores of block",
    "bulk stores under way at the exit": "bulk stores that nobody waited for",
    "no fence before bulk copies": "bulk copy of a store without fence_async_copies",
    "misaligned bulk copy": "bulk_load: an address that 16 do not divide",
    "bulk copy of 24 bytes": "bulk_load of 24 bytes, which 16 do not divide",
    "past the end of a peer's memory": "outside of shared memory: .* bytes at shared",
    "bulk copy of what this kernel stored": "bulk copy of a store without fence_async_copies on x",
    "x not waited for": "(write after read|read after write) on shared memory",
    "too many arrivals": PHASE,
    "bytes announced one phase early": "more arrivals at the mbarrier .* than the 1 of a phase",
    "mbarriers not published": "before publish_mbarriers",
    "no barrier after the initialisation": "was not initialised|read after write on shared memory",
    "mbarrier not initialised": "was not initialised",
    "mbarrier initialised twice": "is initialised twice",
    "mbarrier overwritten": "mbarrier at shared.* was overwritten",
    "rank outside of the cluster": "rank 4 in a cluster of 4",
    "phase instead of its parity": "a wait for parity 2",
    "a waiter that may miss a phase": "may end before block . thread 96 has seen the end",
    "named barrier with two numbers": "different numbers|deadlock: .* at named_barrier in planted",
}  # fmt: skip
ONLY_BULK = {"too few bytes announced"}


@pytest.mark.parametrize("bulk", [False, True], ids=["by thread", "bulk"])
@pytest.mark.parametrize("variant", ["plain", "race"])
def test_a_right_cluster_kernel_is_right_under_every_schedule(variant, bulk):
    for order in ORDERS:
        for seed in range(10):
            assert run(variant, "cluster", 0, bulk, order, seed) == (0, 0, ""), (order, seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bulk", [False, True], ids=["by thread", "bulk"])
@pytest.mark.parametrize("name", list(IN_CLUSTER)[1:])
def test_bug_in_a_cluster_kernel_is_seen_under_every_schedule(name, bulk, order):
    for seed in SEEDS:
        outcome, races, text = run(
            "race", "cluster", list(IN_CLUSTER).index(name), bulk, order, seed
        )
        assert outcome == 2 or races > 0
        assert re.search(IN_CLUSTER[name], text), text


@pytest.mark.parametrize(
    "name", ["source overwritten before it was read", "bulk stores not waited for"]
)
def test_late_copies_show_an_overwritten_source_without_the_checker(name):
    """Copies read their source when they arrive, so that the result is wrong."""
    outcomes = {
        order: {run("plain", "cluster", list(IN_CLUSTER).index(name), 1, order, seed)[0]
                for seed in range(10)}
        for order in ORDERS
    }  # fmt: skip
    assert outcomes["fifo"] == {0}
    assert 1 in set().union(*outcomes.values())


def test_a_missed_phase_shows_without_the_checker():
    bug = list(IN_CLUSTER).index("a waiter that may miss a phase")
    found = {run("plain", "cluster", bug, 0, order, seed) for order in LATE for seed in range(50)}
    assert any("missed its end" in text for _, _, text in found)


# In the order of simt/planted_multicast.cu; what the report must match under every schedule.
MULTICAST = {
    "no bug": "",
    "empty slot not awaited": PHASE,
    "a CTA left out of the ranks": "deadlock: .* at wait in planted_multicast.cu:",
    "wrong parity of the wait for a full slot": f"{PHASE}|read after write|deadlock",
    "wrong parity of the wait for an empty slot": f"{PHASE}|deadlock|may end before",
    "a slot that only its own CTA has read": f"{PHASE}|sent in phase 0 of .* arrive in phase 1",
    "arrival before the other lanes have read": "write after read on shared memory",
    "exit while arrivals are under way": "which has exited|may exit before (arrivals|copies) have",
    "no barrier after the initialisation": "was not initialised|read after write on shared memory",
    "rank outside of the cluster": "rank 4 in a cluster of 4",
    "the whole block from every CTA": f"{PHASE}|sent in phase 0 of",
}


@pytest.mark.parametrize("variant", ["plain", "race"])
def test_a_right_multicast_is_right_under_every_schedule(variant):
    for order in ORDERS:
        for seed in range(10):
            assert run(variant, "multicast", 0, 0, order, seed) == (0, 0, ""), (order, seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", list(MULTICAST)[1:])
def test_bug_in_a_multicast_is_seen_under_every_schedule(name, order):
    for seed in SEEDS:
        outcome, races, text = run("race", "multicast", list(MULTICAST).index(name), 0, order, seed)
        assert outcome == 2 or races > 0
        assert re.search(MULTICAST[name], text), text


def test_launches_that_every_gpu_refuses_are_errors():
    message = c.create_string_buffer(512)
    for launch, error in [
        ((32, 16, 32, 128), ""),
        ((7, 1, 1024, 227 << 10), ""),
        ((8, 3, 32, 128), "a grid of 8 in clusters of 3"),
        ((34, 17, 32, 128), "a grid of 34 in clusters of 17"),
        ((4, 0, 32, 128), "a grid of 4 in clusters of 0"),
        ((4, 2, 1056, 128), "a CTA of 1056 threads with 128 bytes of shared memory"),
        ((4, 2, 32, 232449), "a CTA of 32 threads with 232449 bytes of shared memory"),
    ]:
        assert load("plain").simt_launch_clusters(*launch, message) == (2 if error else 0)
        assert message.value.decode() == error


def views(kind: str, order: str, seed: int, looks: int, words: int) -> list[tuple[int, ...]]:
    seen, message = (c.c_uint32 * (looks * words))(), c.create_string_buffer(512)
    look = getattr(load("plain"), f"simt_views_of_{kind}")
    assert look(ORDERS.index(order), c.c_uint64(seed), looks, seen, message) == 0, message.value
    return [tuple(seen[j * words : (j + 1) * words]) for j in range(looks)]


def test_copies_arrive_late_in_any_order_and_in_pieces():
    whole, copies, looks = 64, 8, 40
    partial, disorder = set(), set()
    for order in ORDERS:
        for seed in range(20):
            for done, *words in views("copies", order, seed, looks, 1 + copies):
                assert not done or order == "fifo" or sum(words) <= whole * copies
                assert all(n % 4 == 0 for n in words)
                if any(0 < n < whole for n in words):
                    partial.add(order)
                if any(0 < b > a < whole for a, b in pairwise(words)):
                    disorder.add(order)
    assert partial == set(LATE)
    assert disorder == set(LATE) - {"block_up"}  # which is late and in order


def test_an_mbarrier_counts_bytes_when_they_have_arrived():
    for order in ORDERS:
        for seed in range(20):
            seen = views("copies", order, seed, 40, 9)
            done_before = [False, *(bool(row[0]) for row in seen[:-1])]
            for before, (_, *words) in zip(done_before, seen, strict=True):
                assert not before or words == [64] * 8
            assert seen[-1][0] == 1


# ---- the grid ----

# In the order of tests/cuda/simt/planted_grid.cu. What has no report gives a wrong result.
IN_GRID = {
    "no bug": "",
    "phase that does not toggle": "^$",
    "word read before it was validated": "^$",
    "one slot": "^$|livelock .* at poll_packet in planted_grid.cu",
    "slots not zeroed": "^$|livelock .* at poll_packet in planted_grid.cu",
    "ordinary load": "read after write on slots",
    "ordinary store": "on slots",
    "data inferred from a word": "read after write on y",
    "misaligned packet": "poll_packet: an address that 16 do not divide",
}
WAYS = ["words", "half words", "packets"]


@pytest.mark.parametrize("way", range(3), ids=WAYS)
@pytest.mark.parametrize("variant", ["plain", "race"])
def test_a_right_grid_kernel_is_right_under_every_schedule(variant, way):
    for order in ORDERS:
        for seed in range(10):
            assert run(variant, "grid", 0, way, order, seed) == (0, 0, ""), (order, seed)


@pytest.mark.parametrize("order", LATE)
@pytest.mark.parametrize("way", range(3), ids=WAYS)
@pytest.mark.parametrize("name", list(IN_GRID)[1:])
def test_bug_in_a_grid_kernel_is_seen_under_every_late_schedule(name, way, order):
    for seed in SEEDS:
        outcome, races, text = run("race", "grid", list(IN_GRID).index(name), way, order, seed)
        assert outcome > 0 or races > 0
        assert re.search(IN_GRID[name], text), text


def test_words_of_a_packet_become_visible_one_by_one_and_never_go_back():
    mixed, split = False, False
    for order in LATE:
        for seed in range(10):
            before = [0] * 8
            for word, whole, *halved in views("packets", order, seed, 60, 4):
                assert whole >> 16 == whole & 0xFFFF, "a word that was sent whole"
                halves = [half for x in (word, whole, *halved) for half in (x & 0xFFFF, x >> 16)]
                assert all(now >= then for now, then in zip(halves, before, strict=True))
                before = halves
                mixed |= word != whole & 0xFFFF
                split |= any(x >> 16 != x & 0xFFFF for x in halved)
    assert mixed
    assert split


def test_address_sanitizer_finds_nothing_in_the_emulated_exchange():
    sanitize(
        "import test_emulated_exchange as t\n"
        "for order in t.ORDERS:\n"
        "  for kernel, ways in (('cluster', 2), ('grid', 3)):\n"
        "    for way in range(ways):\n"
        "      assert t.run('asan', kernel, 0, way, order, 1) == (0, 0, '')\n"
        "  print('right:', order)\n",
        right=6,
    )
