"""Evaluation in several processes: who takes what, and sums of integer counts. Started by ``torchrun``; gloo carries CPU tensors."""

from __future__ import annotations

import json
import os

import numpy as np
import torch
import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """(0, 1) outside of ``torchrun``; inside, the process group is made on the first call."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def add_over_processes(counts: np.ndarray) -> None:
    """Replace int64 ``counts`` by their sum over the processes."""
    if rank_and_world()[1] > 1:
        total = torch.from_numpy(np.ascontiguousarray(counts))
        dist.all_reduce(total)
        counts[...] = total.numpy()


def gather_names(names: list[str]) -> list[str]:
    """The strings of all processes, rank by rank. They travel as JSON: nothing is unpickled."""
    world = rank_and_world()[1]
    if world == 1:
        return names
    text = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    longest = torch.tensor([len(text)])
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    own = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
    own[: len(text)] = text
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own)
    return [name for part in parts for name in json.loads(bytes(part.tolist()).decode())]
