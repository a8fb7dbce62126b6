"""On a GPU the module compiles, exports, is captured in CUDA graphs and differentiates again."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method.*is deprecated"),  # in Dynamo
    pytest.mark.usefixtures("exact_products"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


class Tagger(nn.Module):
    """What a user compiles: an embedding, the stack, a head."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = fastlstm.LSTM(6, 16, 2, **options)
        self.head = nn.LazyLinear(3)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


def tagger(device, **options):
    model = Tagger(**options)
    model(torch.zeros(1, 1, dtype=torch.int64))  # gives the head its size
    return model.to(device)


def assert_steps_alike(run, model, *inputs):
    """Outputs and gradients of the two, for one input after the other."""
    for x in inputs:
        found, expected = run(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        grads = [
            torch.autograd.grad(y.square().sum(), list(model.parameters()))
            for y in (found, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"layer_norm": True}], ids=str)
def test_compiles_to_one_graph(options, device):
    model = tagger(device, **options)
    tokens = torch.randint(11, (3, 7, 4), device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    run = torch.compile(model, fullgraph=True, backend=backend)
    assert_steps_alike(run, model, *tokens)


def test_packed_and_index_input_compile_to_one_graph(device):
    lstm = fastlstm.LSTM(5, 8, device=device)
    packed = pack_padded_sequence(torch.randn(4, 3, 5, device=device), torch.tensor([4, 2, 1]))
    index = torch.randint(5, (4, 3), device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    run = torch.compile(lstm, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(packed)[0].data, lstm(packed)[0].data)
    torch.testing.assert_close(run(index), lstm(index))


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_compiles_with_reduced_overhead(options):
    """In CUDA graphs, which replay what was captured."""
    model = tagger("cuda", **options)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")

    def run(x):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    assert_steps_alike(run, model, *torch.randint(11, (6, 7, 4), device="cuda"))


@pytest.mark.cuda
def test_dropout_is_drawn_anew_in_every_replay():
    lstm = fastlstm.LSTM(4, 64, 2, dropout=0.5, device="cuda")
    x = torch.randn(5, 3, 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        lstm(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = lstm(x)[0]
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.clone())
    assert not torch.equal(*seen)


@pytest.mark.cuda
def test_graphed_callables_train_as_eager_ones():
    eager = fastlstm.LSTM(6, 16, 2, bidirectional=True, device="cuda")
    graphed = torch.cuda.make_graphed_callables(
        copy.deepcopy(eager), (torch.randn(7, 4, 6, device="cuda", requires_grad=True),)
    )
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, graphed)]
    for _ in range(4):
        x = torch.randn(7, 4, 6, device="cuda")
        results = []
        for module, optimizer in zip((eager, graphed), optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad(set_to_none=True)
            y, (h_n, c_n) = module(leaf)
            (y.square().sum() + h_n.sum() + c_n.sum()).backward()
            optimizer.step()
            results.append(
                [y.detach().clone(), leaf.grad.clone(), *map(torch.clone, module.parameters())]
            )
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_exports_for_any_length(device):
    lstm = fastlstm.LSTM(6, 16, 2, device=device).eval()
    steps = torch.export.Dim("steps", min=2, max=50)
    program = torch.export.export(
        lstm, (torch.randn(7, 4, 6, device=device),), dynamic_shapes=({0: steps},)
    )
    for n in (3, 11):
        x = torch.randn(n, 4, 6, device=device)
        torch.testing.assert_close(program.module()(x), lstm(x))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("fastlstm.forward" in name for name in names)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_gradients_of_gradients(options, device):
    """cuDNN has none. The first batched, too."""
    lstm = fastlstm.LSTM(2, 3, **options, device=device).double()
    x = torch.randn(3, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    checked = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(lambda x: lstm(x)[0], (x,), **checked)
    assert torch.autograd.gradgradcheck(lambda x: lstm(x)[0], (x,), **checked)
    penalty = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)[0].square().sum()
    penalty.backward()
    assert lstm.weight_hh_l0.grad.abs().sum() > 0


def test_gradients_of_every_sample(device):
    lstm = fastlstm.LSTM(3, 4, 2, device=device).double()
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(5, 6, 1, 3, device=device, dtype=torch.float64)

    def loss(parameters, x):
        output, (_, c_n) = functional_call(lstm, parameters, (x,))
        return output.square().sum() + c_n.sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for v in range(5):
        expected = grad(loss)(parameters, x[v])
        for name in parameters:
            torch.testing.assert_close(found[name][v], expected[name])
