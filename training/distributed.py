"""Several processes that share the work, started by torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .scoring import Predictions


@dataclass(frozen=True)
class World:
    """The processes that share the work, as torchrun tells them. One, unless it does."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @classmethod
    def join(cls, device: str) -> World:
        if "WORLD_SIZE" not in os.environ:
            return cls(device=torch.device(device))
        at = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
        if at.type == "cuda":
            torch.cuda.set_device(at)
        dist.init_process_group("nccl" if at.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), at)

    def gather_rows(self, mine: Tensor, count: int) -> Tensor:
        """(b, k) of this process -> (count, k), the rows of the whole batch in their order."""
        if self.size == 1:
            return mine
        whole = mine.new_zeros(count, mine.shape[1])
        whole[self.rank :: self.size] = mine
        dist.all_reduce(whole)
        return whole

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def gather_predictions(self, mine: Predictions) -> Predictions:
        if self.size == 1:
            return mine
        parts: list[Predictions] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        whole: Predictions = {}
        for part in parts:
            for video, (label, rows) in part.items():
                merged = whole.setdefault(video, (label, {}))[1]
                for row, entry in rows.items():
                    merged[row] = min(merged.get(row, entry), entry)
        return whole

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
