"""explain and algorithm: what the planner says of GPUs that need not be there."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastlstm
from fastlstm import algorithms
from fastlstm.ops import native
from fastlstm.ops.algorithm import settings

ROOT = Path(__file__).parents[2]


def test_the_cpu_has_one_algorithm():
    found = fastlstm.explain(fastlstm.LSTM(5, 7), 3, 4)
    assert (found.device, found.algorithm, found.backward_algorithm) == ("cpu", "fused", "fused")
    assert "fused" in str(found)
    assert "us a step" not in str(found)


def far(lstm, weight):
    """The module, as if its weights were like this one."""
    lstm.__class__ = type("Far", (fastlstm.LSTM,), {"weight_hh_l0": weight})
    return lstm


def test_torchs_lstm_is_named_where_there_are_no_kernels(monkeypatch):
    found = fastlstm.explain(fastlstm.LSTM(2, 3, dtype=torch.complex64), 1, 1)
    assert (found.algorithm, found.backward_algorithm) == ("torch", "torch")
    assert found.reason == "there are no kernels for torch.complex64"
    monkeypatch.setattr(native, "_C_cuda", None)
    native._missing_on_gpu.cache_clear()
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    found = fastlstm.explain(far(fastlstm.LSTM(2, 3), weight), 1, 1)
    native._missing_on_gpu.cache_clear()
    assert (found.device, found.algorithm) == ("cuda:0", "torch")
    assert found.backward_reason == "the CUDA kernels were not built"


def test_a_gpu_counts_as_what_it_and_its_kernels_can(monkeypatch):
    """Clusters do nothing in PTX of 8.0, and those of 16 CTAs need as many SMs side by side."""
    lstm = fastlstm.LSTM(65, 512, dtype=torch.bfloat16, device="meta")
    weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    on_gpu = far(lstm, weight)
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for code, cluster, algorithm in ((80, 16, "grid"), (90, 16, "cluster"), (90, 8, "grid")):
        sizes = (code, 132, 227 << 10, cluster)
        module = SimpleNamespace(architectures="8.0+PTX", gpu_sizes=lambda sizes=sizes: sizes)
        monkeypatch.setattr(native, "_C_cuda", module)
        native._missing_on_gpu.cache_clear()
        found = fastlstm.explain(on_gpu, 16, 100)
        assert (found.device, found.algorithm) == ("cuda:0 (a GPU)", algorithm)
    native._missing_on_gpu.cache_clear()
    assert current == [weight.device] * 3


@pytest.mark.parametrize("gpu", algorithms.GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_gpu_runs_every_problem(gpu, dtype):
    lstm = fastlstm.LSTM(5, 7, 2, proj_size=3, bidirectional=True, dtype=dtype)
    found = fastlstm.explain(lstm, 3, 4, packed=True, gpu=gpu)
    assert found.device == gpu
    assert found.algorithm == found.backward_algorithm == "stepwise"
    assert found.reason
    assert found.step_microseconds > 0


@pytest.mark.parametrize(
    ("gpu", "algorithm", "batch"),
    [
        ("A100", "grid", 8),
        ("RTX 4090", "grid", 32),
        ("RTX 5090", "grid", 32),
        ("H100", "cluster", 100),
        ("H200", "cluster", 100),
    ],
)
def test_weights_that_fit_stay_on_chip(gpu, algorithm, batch):
    lstm = fastlstm.LSTM(65, 512, 2, dtype=torch.bfloat16)
    found = fastlstm.explain(lstm, batch, 100, gpu=gpu)
    assert found.algorithm == found.backward_algorithm == algorithm
    assert f"{found.ctas} SMs for {found.sequences} sequences" in str(found)
    with fastlstm.algorithm("stepwise"):
        slower = fastlstm.explain(lstm, batch, 100, gpu=gpu)
    assert found.step_microseconds < slower.step_microseconds
    assert "us a step" in str(found)
    assert slower.ctas == slower.backward_ctas == 0
    assert "SMs for" not in str(slower)


@pytest.mark.parametrize(("hidden", "batch"), [(64, 128), (256, 16), (512, 100), (768, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpus_with_clusters_but_little_shared_memory_run_no_clusters(hidden, batch, dtype):
    """Compute capability 12 has 99 KiB for a block, and a launch that asks for more fails."""
    lstm = fastlstm.LSTM(65, hidden, 2, dtype=dtype, device="meta")
    found = fastlstm.explain(lstm, batch, 100, gpu="RTX 5090")
    assert {found.algorithm, found.backward_algorithm} <= {"grid", "stepwise"}
    refusal = "clusters need 227 KiB of shared memory for each block"
    with fastlstm.algorithm("cluster"), pytest.raises(ValueError, match=refusal):
        fastlstm.explain(lstm, batch, 100, gpu="RTX 5090")


def test_wide_steps_need_their_shared_memory(monkeypatch):
    """They are estimated to be the fastest of a layer of this size, where a GPU can run them."""
    lstm = fastlstm.LSTM(65, 2048, dtype=torch.bfloat16, device="meta")
    steps = []
    for shared in (99, 227):  # KiB
        monkeypatch.setitem(algorithms.GPUS, "some", (120, 170, shared << 10))
        with fastlstm.algorithm("stepwise"):
            steps.append(fastlstm.explain(lstm, 128, 100, gpu="some").step_microseconds)
    assert steps[0] > steps[1]


# The problems that cuDNN was compared with on a GPU: input and hidden size, layers, directions,
# batch, steps; the steps of a chunk, forward and backward.
COMPARED = {
    "Karpathy's batch": (65, 512, 2, 1, 100, 100, 0, 0),
    "long, H256": (256, 256, 1, 1, 16, 1024, 0, 0),
    "long, H768": (768, 768, 1, 1, 16, 1024, 0, 0),
    "long, H1024": (1024, 1024, 1, 1, 64, 512, 0, 0),
    "small": (65, 128, 2, 1, 50, 50, 0, 0),
    "wide batch": (40, 64, 2, 1, 128, 200, 100, 67),
    "speech": (80, 512, 3, 2, 32, 200, 0, 0),
    "H384": (100, 384, 2, 1, 20, 150, 30, 30),
    "batch 1": (256, 256, 1, 1, 1, 100, 0, 0),
    "H2048": (2048, 2048, 1, 1, 128, 256, 0, 0),
    "H4096": (1024, 4096, 1, 1, 32, 64, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_layers_work_at_once_where_explain_says_so(name):
    inputs, hidden, layers, directions, batch, steps, forward, backward = COMPARED[name]
    lstm = fastlstm.LSTM(
        inputs, hidden, layers, bidirectional=directions == 2, dtype=torch.bfloat16, device="meta"
    )
    found = fastlstm.explain(lstm, batch, steps, gpu="H200")
    assert (found.chunk_steps, found.backward_chunk_steps) == (forward, backward)
    said = [
        f"{layers} layers in {-(-steps // chunk)} chunks of {chunk} steps"
        for chunk in (forward, backward)
        if chunk
    ]
    assert all(words in str(found) for words in said)
    assert str(found).count("chunks of") == len(said)


def test_forced_algorithm_is_explained_or_refused():
    lstm = fastlstm.LSTM(5, 7)
    with fastlstm.algorithm("stepwise"):
        assert "asked for" in fastlstm.explain(lstm, 3, 4, gpu="H200").reason
    assert "asked for" not in fastlstm.explain(lstm, 3, 4, gpu="H200").reason
    refusal = '"cluster" cannot run: clusters need a GPU of compute capability 9.0'
    with fastlstm.algorithm("cluster"), pytest.raises(ValueError, match=refusal):
        fastlstm.explain(lstm, 3, 4, gpu="A100")
    y = torch.randn(4, 3, 5)
    with fastlstm.algorithm("cluster"):  # the CPU ignores it
        lstm(y)


def test_what_is_explained_besides_a_plain_module():
    expected = fastlstm.explain(fastlstm.LSTM(5, 7), 3, 4, gpu="H200")
    assert fastlstm.explain(nn.LSTM(5, 7), 3, 4, gpu="H200") == expected
    normed = weight_norm(fastlstm.LSTM(5, 7), "weight_hh_l0")
    assert fastlstm.explain(normed, 3, 4, gpu="H200") == expected
    with pytest.raises(TypeError, match=r"expected a fastlstm\.LSTM or an nn\.LSTM, got GRU"):
        fastlstm.explain(nn.GRU(5, 7), 3, 4)


def test_mistakes():
    lstm = fastlstm.LSTM(5, 7)
    with pytest.raises(ValueError, match="expected one of auto, stepwise"), fastlstm.algorithm("x"):
        pass
    with pytest.raises(ValueError, match="gpu: expected one of T4"):
        fastlstm.explain(lstm, 3, 4, gpu="RTX")
    with pytest.raises(ValueError, match="batch_size: expected a positive"):
        fastlstm.explain(lstm, 0, 4)
    with pytest.raises(ValueError, match="seq_length: expected a positive"):
        fastlstm.explain(lstm, 1, 0)
    for sizes in ({}, {"batch_size": 1}, {"seq_length": 1}):
        with pytest.raises(TypeError, match="expected the input's batch_size and seq_length"):
            fastlstm.explain(lstm, **sizes)


@pytest.mark.parametrize(
    ("value", "said"), [("stepwise", "asked for"), ("fast", "FASTLSTM_ALGO: expected one of auto")]
)
def test_environment_forces_an_algorithm(value, said):
    code = "import fastlstm; print(fastlstm.explain(fastlstm.LSTM(2, 3), 1, 1, gpu='A100'))"
    found = fork_server.run("-c", code, env={"FASTLSTM_ALGO": value, "PATH": ""}, cwd=ROOT)
    assert said in found.stdout + found.stderr


def test_tf32_follows_the_flag_of_cudnns_rnns(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert settings() == (False, 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert settings() == (True, 0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FASTLSTM_CUDA": "maybe"}, "FASTLSTM_CUDA: expected auto, 0 or 1, got 'maybe'"),
        ({"FASTLSTM_CUDA": "0"}, "CUDA kernels are not built: FASTLSTM_CUDA=0"),
    ],
)
def test_setup_says_why_cuda_is_not_built(environment, said):
    import os

    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], env={**os.environ, **environment}, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert said in found.stdout + found.stderr
