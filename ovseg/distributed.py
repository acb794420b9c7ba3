"""Which of several processes this is, and the few things they agree on. The only place that reads ranks and opens the process group.

Started by ``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) or by ``srun`` (SLURM_*). Nothing is opened until the first collective: who
takes what can be asked without a group. What is small travels over gloo as integers or JSON, on a GPU machine too; gradients and features
use NCCL there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .errors import ConfigError

# torchrun's name, then srun's; SLURM_STEP_* exist inside srun only, so that the script that sbatch runs is one process.
_NAMES = {"rank": ("RANK", "SLURM_PROCID"), "world": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), "local": ("LOCAL_RANK", "SLURM_LOCALID")}


def rank() -> int:
    """0 in one process."""
    return _number("rank", 0) if world_size() > 1 else 0


def world_size() -> int:
    return _number("world", 1)


def local_rank() -> int:
    """Among the processes of this machine: which GPU is its own."""
    return _number("local", rank()) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


def run_name() -> str:
    """Return what the processes of one run have in common, and of runs at the same time no other; "" in one process."""
    if world_size() == 1:
        return ""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join([f"of {world_size()}", *(os.environ[name] for name in names if name in os.environ)])


def device(name: str = "auto") -> torch.device:
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda`` (of several processes each takes the GPU of its local rank), ``cuda:1``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} and torch sees no GPU; expected 'cpu' or 'auto'")
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()  # meta holds no numbers, others are not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device is {name!r}, which torch cannot use here; expected 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and found.index is None and world_size() > 1:
        found = torch.device("cuda", local_rank())
        torch.cuda.set_device(found)  # NCCL and kernels without an explicit device use it
    return found


def group() -> dist.ProcessGroup | None:
    """The group of all processes, opened on the first call; None in one process."""
    if world_size() == 1:
        return None
    if not dist.is_initialized():
        address, port = _meeting_place()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        place = f"tcp://{address}:{port}" if address else "env://"
        dist.init_process_group(backend, init_method=place, rank=rank(), world_size=world_size())
    return dist.group.WORLD


def close() -> None:
    """Leave the group, if there is one: at the end of a program, in every process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_for(seed: int, rank: int) -> int:
    """A seed of 63 bits for one process: other numbers on every rank and for every seed."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def any_flag(*flags: bool) -> tuple[bool, ...]:
    """Of each flag whether any process has raised it: what all of them then do together."""
    found = np.array(flags, np.int64)
    all_reduce_sum(found)
    return tuple(bool(x) for x in found)


def all_reduce_sum(array: np.ndarray) -> np.ndarray:
    """Replace ``array`` by its sum over the processes, and return it. Integers add up exactly, whatever the order."""
    if (everyone := group()) is not None:
        total = torch.from_numpy(np.ascontiguousarray(array))
        dist.all_reduce(total, group=everyone)
        array[...] = total.numpy()
    return array


def smallest(*numbers: int) -> tuple[int, ...]:
    """Of each number the smallest of all processes."""
    if (everyone := group()) is None:
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=everyone)
    return tuple(found.tolist())


def gather_strings(strings: list[str]) -> list[str]:
    """The strings of all processes, rank by rank. They travel as JSON: nothing is unpickled."""
    if (everyone := group()) is None:
        return list(strings)
    text = torch.frombuffer(bytearray(json.dumps(strings).encode()), dtype=torch.uint8)
    longest = torch.tensor([len(text)])
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=everyone)
    own = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
    own[: len(text)] = text
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own, group=everyone)
    return [string for part in parts for string in json.loads(part.numpy().tobytes())]


def broadcast_json(value: Any) -> Any:
    """What rank 0 passed; anything that JSON holds."""
    if world_size() == 1:
        return value
    return json.loads(gather_strings([json.dumps(value)] if is_main() else [])[0])


def barrier() -> None:
    """Wait for all processes."""
    any_flag(False)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one collective a device and dtype.

    A parameter that has a gradient in some processes only has zeros in the others; one that has none anywhere keeps none.
    """
    if (everyone := group()) is None:
        return
    listed = list(parameters)
    some = all_reduce_sum(np.array([p.grad is not None for p in listed], np.int64))
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for parameter, found in zip(listed, some, strict=True):
        if found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter.grad)
    for gradients in kinds.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=everyone)
        flat /= world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _number(kind: str, otherwise: int) -> int:
    name = _NAMES[kind]["WORLD_SIZE" not in os.environ]
    if name not in os.environ:
        return otherwise
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise ConfigError(f"{name} is {os.environ[name]!r} in the environment; expected a number, as torchrun and srun set it") from error


def _meeting_place() -> tuple[str | None, int]:
    """Host and port of rank 0 under srun, which names neither; (None, 0) where the environment has both."""
    if "MASTER_ADDR" in os.environ:
        return None, 0
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if nodes is None:
        raise ConfigError(f"the environment says {world_size()} processes and names no MASTER_ADDR; expected torchrun or srun")
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)  # node[07-09,12] or a,b: the first of them
    assert found is not None
    host = found[1] + (found[2] or "")
    return host, int(os.environ.get("MASTER_PORT", 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
