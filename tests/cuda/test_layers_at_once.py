"""Layers that work at once on streams of their own: on a GPU, beside other work and in graphs."""

import copy
import threading

import pytest
import torch

import fastlstm

pytestmark = pytest.mark.cuda


def stack():
    """Two layers that the planner divides into chunks on every GPU with clusters."""
    lstm = fastlstm.LSTM(40, 256, 2, dtype=torch.bfloat16, device="cuda")
    if torch.cuda.get_device_capability()[0] >= 9:
        found = fastlstm.explain(lstm, 16, 600)
        assert found.chunk_steps > 0
        assert found.backward_chunk_steps > 0
    return lstm, torch.randn(600, 16, 40, dtype=torch.bfloat16, device="cuda")


def results(lstm, x):
    y, (h_n, c_n) = lstm(x)
    loss = y.float().square().sum() + h_n.float().sum() + c_n.float().sum()
    return [y.detach(), h_n.detach(), c_n.detach(), *torch.autograd.grad(loss, lstm.parameters())]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layers_at_once_agree_with_layers_in_turn():
    """With modules of one layer each, whose layers run in turn; products may round otherwise."""
    lstm, x = stack()
    layers = [fastlstm.LSTM(n, 256, dtype=x.dtype, device="cuda") for n in (40, 256)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for name, weight in layer.named_parameters():
                weight.copy_(lstm.get_parameter(name.replace("_l0", f"_l{number}")))
        found, (h_n, c_n) = lstm(x)
        below, (h_below, _) = layers[0](x)
        above, (h_above, c_above) = layers[1](below)
    torch.testing.assert_close(found, above, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(c_n[1:], c_above, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(h_n, torch.cat((h_below, h_above)), rtol=2e-2, atol=2e-2)


def test_repeats_have_the_same_bits_and_keep_no_memory():
    lstm, x = stack()
    expected, held = results(lstm, x), []
    for n in range(40):
        assert same(results(lstm, x), expected)
        if n in (9, 39):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1]


def test_a_graph_records_all_streams():
    """Replayed with other inputs, and while the layers work in another call as well."""
    lstm, x = stack()
    eager = copy.deepcopy(lstm)
    graphed = torch.cuda.make_graphed_callables(lstm, (x.clone(),))
    for _ in range(3):
        fresh = torch.randn_like(x)
        expected = results(eager, fresh)
        assert same(results(graphed, fresh), expected)
        assert same(results(eager, fresh), expected)


def test_threads_on_streams_of_their_own_get_the_bits_that_they_get_alone():
    modules = [stack() for _ in range(3)]
    alone = [results(*module) for module in modules]
    torch.cuda.synchronize()
    wrong, start = [], threading.Barrier(3)

    def work(i):
        try:
            stream = torch.cuda.Stream()
            start.wait(60)
            with torch.cuda.stream(stream):
                for _ in range(10):
                    found = results(*modules[i])
                    stream.synchronize()
                    if not same(found, alone[i]):
                        wrong.append(f"thread {i}: other bits")
        except Exception as error:
            wrong.append(repr(error))

    for _ in range(2):  # the second round's threads take the streams of the first
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_call_behind_a_busy_stream_waits_for_it():
    lstm, x = stack()
    expected = results(lstm, x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = results(lstm, late)
        late.zero_()
    stream.synchronize()
    assert same(found, expected)
