"""DDP, FSDP2 and DataParallel with fastlstm.LSTM inside: two processes over gloo on the CPU."""

from pathlib import Path

import fork_server
import pytest
import torch
from torch import nn

import fastlstm

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import time
import torch
import torch.distributed as dist
from torch import nn
import fastlstm

kind, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = fastlstm.LSTM(3, 8, 2, bidirectional=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0])

def run(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

torch.manual_seed(0)
alone, shared = Model(), Model()
shared.load_state_dict(alone.state_dict())
x = torch.randn(5, 4, 3)
run(alone, x)  # the whole batch in one process
mine = x[:, 2 * rank : 2 * rank + 2]
if kind == "ddp":
    shared = nn.parallel.DistributedDataParallel(shared)
    run(shared, mine)
    found = dict(shared.module.named_parameters())
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(shared.lstm, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    run(shared, mine)
    found = {name: p.full_tensor() for name, p in shared.named_parameters()}
for name, p in alone.named_parameters():
    torch.testing.assert_close(found[name].detach(), p.detach(), rtol=1e-4, atol=1e-5)
print("same", flush=True)
dist.barrier()
time.sleep(0.2)  # gloo's threads may want the GIL, for which the group's destructor would not wait
dist.destroy_process_group()
"""


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind):
    port = str(free_port())
    running = [fork_server.start("-c", SCRIPT, kind, rank, port, cwd=ROOT) for rank in range(2)]
    for process in running:
        out, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert out.strip().endswith("same")


def test_data_parallel_without_gpus_is_the_module():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    assert torch.equal(nn.DataParallel(lstm, dim=1)(x)[0], lstm(x)[0])
