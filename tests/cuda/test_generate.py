"""On a GPU text is the CPU's, whether one launch draws it or a loop does."""

import pytest
import torch
from generation_models import assert_greedy, make, primed, state

import fastlstm
from fastlstm.generation.draw import Draw
from fastlstm.generation.generate import packs, run

pytestmark = pytest.mark.usefixtures("exact_products")

SEED = torch.tensor([2**41 + 7])
HOW = {
    "greedy": Draw(0.0),
    "free": Draw(0.9, seed=SEED),
    "filtered": Draw(1.1, 20, 0.9, SEED),
}
MODELS = {  # vocabulary, hidden, layers, batch
    "one of everything": (1, 1, 1, 1),
    "seven": (64, 7, 3, 3),
    "129": (65, 129, 3, 7),
    "karpathy's": (65, 512, 2, 1),
    "karpathy's, a batch": (65, 512, 2, 64),
    "several groups": (65, 100, 2, 200),
    "one large layer": (65, 800, 1, 2),
    "a large vocabulary": (300, 256, 2, 9),
}


def placed(device, *sizes, dtype=torch.float32, scale=2.0, **options):
    torch.manual_seed(3)
    lstm, decoder = make(*sizes, scale=scale, dtype=dtype, **options)
    return lstm.to(device), decoder.to(device)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_modules_on_every_device(name, device):
    *sizes, batch = MODELS[name]
    lstm, decoder = placed(device, *sizes)
    prime, hx = primed(sizes[0], batch=batch).to(device), state(lstm, batch)
    assert packs(lstm, decoder, "fp32")
    tokens, found = fastlstm.generate(lstm, decoder, prime, 20, hx=hx, temperature=0)
    assert tokens.device.type == found[0].device.type == device
    on_cpu = (lstm.cpu(), decoder.cpu(), prime.cpu(), tokens.cpu())
    assert_greedy(*on_cpu, [x.cpu() for x in found], [x.cpu() for x in hx], 2e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_text_on_every_device(name, how, device):
    *sizes, batch = MODELS[name]
    lstm, decoder = placed("cpu", *sizes, scale=1.5)
    prime = primed(sizes[0], batch=batch)
    expected, _ = run(lstm, decoder, prime, 100, None, HOW[how], 5)
    found, _ = run(lstm.to(device), decoder.to(device), prime.to(device), 100, None, HOW[how], 5)
    # A token in a hundred thousand may lie so near an edge that rounding decides.
    rows = (found.cpu() == expected).all(0)
    assert (~rows).sum() <= (1 if batch > 1 else 0)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("batch", [1, 64])
def test_repeats_are_equal_bit_for_bit(weights, batch, device):
    lstm, decoder = placed(device, 65, 512, 2)
    packed, prime = fastlstm.prepack(lstm, decoder, weights), primed(65, batch=batch).to(device)
    first, hx = run(packed, None, prime, 300, None, HOW["free"])
    for _ in range(3):
        again, states = run(packed, None, prime, 300, None, HOW["free"])
        assert torch.equal(again, first)
        assert all(torch.equal(a, b) for a, b in zip(states, hx, strict=True))
    assert len(first.unique()) > 10


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_row_does_not_see_the_others(weights, device):
    lstm, decoder = placed(device, 65, 200, 2)
    packed, prime = fastlstm.prepack(lstm, decoder, weights), primed(65, batch=33).to(device)
    tokens, hx = run(packed, None, prime, 80, None, HOW["greedy"])
    for row in (0, 17, 32):
        alone, states = run(packed, None, prime[:, row : row + 1], 80, None, HOW["greedy"])
        assert torch.equal(alone[:, 0], tokens[:, row])
        if device == "cuda":
            assert all(torch.equal(a[:, 0], b[:, row]) for a, b in zip(states, hx, strict=True))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_calls_go_on_where_others_ended(weights, device):
    lstm, decoder = placed(device, 65, 100, 2)
    packed, prime = fastlstm.prepack(lstm, decoder, weights), primed(65, batch=3).to(device)
    whole, end = run(packed, None, prime, 60, None, HOW["filtered"])
    first, hx = run(packed, None, prime, 23, None, HOW["filtered"])
    second, hx = run(packed, None, first[-1:], 37, hx, HOW["filtered"], offset=23)
    assert torch.equal(whole, torch.cat((first, second)))
    assert all(torch.equal(a, b) for a, b in zip(end, hx, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"proj_size": 5}, {"zoneout_h": 0.2}, {"layer_norm": True}, {"dtype": torch.float64}],
    ids=str,
)
def test_what_no_kernel_holds_runs_step_by_step(options, device):
    lstm, decoder = placed(device, 30, 33, 2, **options)
    lstm.eval()
    if device == "cuda":
        storage = "fp64" if "dtype" in options else "fp32"
        assert not packs(lstm, decoder, storage)
    prime = primed(30, batch=3)
    found, _ = run(lstm, decoder, prime.to(device), 30, None, HOW["free"])
    expected, _ = run(lstm.cpu(), decoder.cpu(), prime, 30, None, HOW["free"])
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modules_of_half_types_draw_their_text(dtype, device):
    lstm, decoder = placed(device, 65, 129, 2, dtype=dtype)
    prime = primed(65, batch=5).to(device)
    tokens, found = fastlstm.generate(lstm, decoder, prime, 20, temperature=0)
    assert {x.dtype for x in found} == {torch.float32}
    on_cpu = (lstm.cpu(), decoder.cpu(), prime.cpu(), tokens.cpu())
    assert_greedy(*on_cpu, [x.cpu() for x in found], tolerance=0.05)


@pytest.mark.cuda
def test_weights_that_do_not_fit_are_refused_by_name():
    lstm, decoder = placed("cuda", 65, 1500, 4)
    with pytest.raises(ValueError, match=r"on cuda:0 cannot be packed.*do not fit"):
        fastlstm.prepack(lstm, decoder)
    tokens, _ = fastlstm.generate(lstm, decoder, primed(65).cuda(), 3, temperature=0)
    assert tokens.shape == (3, 1)


@pytest.mark.cuda
def test_a_text_is_one_launch_and_no_synchronisation():
    lstm, decoder = placed("cuda", 65, 512, 2)
    packed, prime = fastlstm.prepack(lstm, decoder, "bf16"), primed(65).cuda()
    run(packed, None, prime, 5, None, HOW["free"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profile:
            run(packed, None, prime, 500, None, HOW["free"])
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in profile.events() if "generate_kernel" in e.name]
    assert len(kernels) == 1
