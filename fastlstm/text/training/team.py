"""The processes that train together: one, or as many as torchrun started."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .. import UserError


@dataclass(frozen=True)
class Team:
    """One process among those that train a model together.

    Attributes:
        rank, size: which of how many; rank 0 alone writes.
        local: which on this machine.
        restarts: how often torchrun started them again after one was lost.
        device: where tensors for communication lie.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    restarts: int = 0
    device: torch.device | None = None

    @staticmethod
    def of_environment() -> Team:
        """As torchrun describes it; alone where nothing does.

        Raises:
            UserError: the description is not whole.
        """
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
        try:
            rank, size, local, restarts = (int(os.environ.get(n, d)) for n, d in defaults.items())
        except ValueError as error:
            raise UserError(f"WORLD_SIZE and RANK must be numbers: {error}") from None
        if size > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UserError("several processes are started by: torchrun -m fastlstm.train")
        return Team(rank, size, local, restarts)

    def join(self, device: torch.device) -> Team:
        """Set up communication with the other processes, where there are any."""
        if self.size == 1:
            return self
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # torchrun's store outlives a lost process. The prefix hides that process's old address.
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))
        store = dist.PrefixStore(f"attempt_{self.restarts}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        return replace(self, device=device)

    def leave(self) -> None:
        """Wait for all processes, and end their communication."""
        if self.size == 1:
            return
        dist.barrier()
        # Destroying the group waits for gloo's threads while it holds the GIL, which they may need
        # to release their last tensors: give them time to do it before.
        time.sleep(0.1)
        dist.destroy_process_group()

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's ``x``, which has one shape and dtype in all, in the order of ranks."""
        if self.size == 1:
            return [x]
        raw = x.to(self.device).contiguous().view(torch.uint8)  # no backend knows every dtype
        gathered = [torch.empty_like(raw) for _ in range(self.size)]
        dist.all_gather(gathered, raw)
        return [y.view(x.dtype) for y in gathered]

    def numbers(self, *values: float) -> list[list[float]]:
        """Every process's numbers, in the order of ranks."""
        if self.size == 1:
            return [list(values)]
        return [row.tolist() for row in self.gather(torch.tensor(values, dtype=torch.float64))]

    def broadcast(self, value: str, length: int = 4096) -> str:
        """The value of rank 0, at most ``length`` bytes of it."""
        if self.size == 1:
            return value
        sent = os.fsencode(value)[:length].ljust(length, b"\0")
        first = self.gather(torch.frombuffer(bytearray(sent), dtype=torch.uint8))[0]
        return os.fsdecode(bytes(first.tolist()).rstrip(b"\0"))
