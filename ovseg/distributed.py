"""Which of several processes this is, and the few things they agree on.

This is the only place that reads ranks and opens the process group. Processes are started by
``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) or by ``srun`` (SLURM_*). Nothing is opened
until the first collective: who takes what can be asked without a group. What is small travels over
gloo as integers or JSON, on a GPU machine too; gradients and features use NCCL there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from . import time_limits
from .errors import ConfigError, ProcessError, first_line

# What gloo says, in a RuntimeError, of a process that is gone or stands still. Its other complaints
# are faults of this package.
_GONE = re.compile(
    r"gloo.*(closed by peer|reset by peer|broken pipe|connection refused|timed out|timeout)",
    re.IGNORECASE | re.DOTALL,
)
_LAUNCHER = os.getppid()

# Rank, number of processes, rank on this machine. SLURM_STEP_* exist inside srun only: the script
# that sbatch runs, which has the other two, is one process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_EXPECTED = "expected both, as torchrun or srun sets them, or neither"


class Place(NamedTuple):
    """Which process this is among all, and among those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """Return what the environment says of this process.

    Torchrun's variables count before srun's, which may have started it.

    Raises:
        ConfigError: for variables that are no numbers, do not fit each other or lack one another.
            To go on as if there were one process, or none, would do the work twice or not at all.
    """
    of_torchrun = any(name in os.environ for name in _TORCHRUN)
    rank_name, world_name, local_name = _TORCHRUN if of_torchrun else _SRUN
    world = _number(world_name, 1)
    if world is None:
        # The script that sbatch runs has rank 0 beside no number of tasks.
        alone = None if of_torchrun else "0"
        for name in (rank_name, local_name):
            if (given := os.environ.get(name, alone)) != alone:
                raise ConfigError(
                    f"{name} is {given!r} in the environment and {world_name} is missing; "
                    f"{_EXPECTED}"
                )
        return Place()
    rank = _number(rank_name, 0)
    if rank is None:
        if world > 1:
            unread = of_torchrun and _SRUN[0] in os.environ
            beside = f"; {_SRUN[0]} beside {world_name} is not read" if unread else ""
            raise ConfigError(
                f"{world_name} is {world} in the environment and {rank_name} is missing{beside}; "
                f"{_EXPECTED}"
            )
        rank = 0
    if rank >= world:
        raise ConfigError(
            f"{rank_name} is {rank} in the environment and {world_name} is {world}; expected 0 to "
            f"{world - 1}"
        )
    local = _number(local_name, 0)
    # Of those before it, as many as its local rank run on this machine.
    if local is not None and local > rank:
        raise ConfigError(
            f"{local_name} is {local} in the environment and {rank_name} is {rank}; expected 0 to "
            f"{rank}"
        )
    here = _number("LOCAL_WORLD_SIZE", 1) if of_torchrun else None
    if here is not None and (here > world or (local or 0) >= here):
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {here} in the environment, {world_name} is {world} and "
            f"{local_name} is {os.environ.get(local_name, 'missing')}; expected {local_name} < "
            f"LOCAL_WORLD_SIZE <= {world_name}"
        )
    return Place(rank, world, rank if local is None else local)


def rank() -> int:
    """Return the rank of this process; 0 in one process."""
    return place().rank


def world_size() -> int:
    """Return the number of processes."""
    return place().world_size


def local_rank() -> int:
    """Return the rank among the processes of this machine: which GPU is its own."""
    return place().local_rank


def is_main() -> bool:
    """Return whether this process writes the files and prints."""
    return rank() == 0


def run_name() -> str:
    """Return what the processes of this run have in common with no other; "" in one process."""
    if world_size() == 1:
        return ""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join(
        [f"of {world_size()}", *(os.environ[name] for name in names if name in os.environ)]
    )


def device(name: str = "auto") -> torch.device:
    """Return the device of this process.

    Args:
        name: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` (of several processes each
            takes the GPU of its local rank), ``cuda:1``.

    Raises:
        ConfigError: if torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} and torch sees no GPU; expected 'cpu' or 'auto'")
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()  # meta holds no numbers, others are not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device is {name!r}, which torch cannot use here; expected 'auto', 'cpu', 'cuda' or "
            "'cuda:0'"
        ) from error
    if found.type == "cuda" and found.index is None and world_size() > 1:
        found = torch.device("cuda", local_rank())
        torch.cuda.set_device(found)  # NCCL and kernels without an explicit device use it
    return found


def group() -> dist.ProcessGroup | None:
    """Return the group of all processes, opened on the first call; None in one process."""
    if world_size() == 1:
        return None
    if not dist.is_initialized():
        _open()
    return dist.group.WORLD


def _open() -> None:
    """Open the group.

    The wait for the others has a short limit of its own: where one does not start, the rest should
    end soon.

    Raises:
        ProcessError: if they have not all come in time.
    """
    address, port = _meeting_place()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    meeting = f"tcp://{address}:{port}" if address else "env://"
    limit = time_limits.start_limit()
    later = timedelta(seconds=time_limits.rank_limit())
    try:
        host = address or os.environ["MASTER_ADDR"]
        left = _wait_for_rank_0(host, str(port or os.environ.get("MASTER_PORT", "")), limit)
        dist.init_process_group(
            backend,
            init_method=meeting,
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(seconds=left),
        )
    except (dist.DistError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_gone(error):
            raise
        raise ProcessError(
            f"the {world_size()} processes did not come together ({first_line(error)}); expected "
            f"all to be started within {limit:g} s of each other (OVSEG_START_TIMEOUT), and a "
            "MASTER_PORT that is free"
        ) from error
    # Torch 2.14 has a public name for it.
    public: Any = getattr(dist, "set_timeout", None)
    set_timeout = public or dist.distributed_c10d._set_pg_timeout
    set_timeout(later, dist.group.WORLD)


def _wait_for_rank_0(address: str, port: str, limit: float) -> float:
    """Wait until rank 0 listens; returns what is left of ``limit``, in seconds.

    Torch's own wait takes twice its limit and prints stacks.

    Raises:
        OSError: if it does not in time.
    """
    deadline = time.monotonic() + limit
    while rank() > 0 and port.isdigit():  # torch refuses another
        try:
            patience = max(0.1, deadline - time.monotonic())
            socket.create_connection((address, int(port)), timeout=patience).close()
            break
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
    return max(5.0, deadline - time.monotonic())


@contextlib.contextmanager
def others_watched(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say in a sentence that another process is gone or does not answer; the libraries take many.

    Args:
        advice: what to do about it, asked for at that moment.

    Raises:
        ProcessError: in their place.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _is_gone(error):
            raise
        text = f"another of {world_size()} processes ended or stopped answering ({_short(error)})"
        raise ProcessError(f"{text}; {advice()}".removesuffix("; ")) from error


def launcher_gone() -> bool:
    """Return whether torchrun, which started this process, has ended without a word."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _LAUNCHER


def _is_gone(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _GONE.search(str(error)) is not None


def _short(error: RuntimeError) -> str:
    """Return the first sentence of an error, without the place in gloo's code."""
    return re.sub(r"^\[[^\]]*\] ", "", first_line(error)).split(". ")[0]


def close() -> None:
    """Leave the group, if there is one: at the end of a program, in every process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_for(seed: int, rank: int) -> int:
    """Return a seed of 63 bits for one process, another one for every rank and seed."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def any_flag(*flags: bool) -> tuple[bool, ...]:
    """Return of each flag whether any process has raised it; all then do the same."""
    found = np.array(flags, np.int64)
    all_reduce_sum(found)
    return tuple(bool(x) for x in found)


def all_reduce_sum(array: np.ndarray) -> np.ndarray:
    """Replace ``array`` by its sum over the processes, and return it.

    Integers add up exactly, whatever the order.
    """
    if (everyone := group()) is not None:
        total = torch.from_numpy(np.ascontiguousarray(array))
        dist.all_reduce(total, group=everyone)
        array[...] = total.numpy()
    return array


def smallest(*numbers: int) -> tuple[int, ...]:
    """Return the smallest of all processes, of each number."""
    if (everyone := group()) is None:
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=everyone)
    return tuple(found.tolist())


def gather_strings(strings: list[str]) -> list[str]:
    """Return the strings of all processes, rank by rank.

    They travel as JSON: nothing is unpickled.
    """
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
    """Return what rank 0 passed; anything that JSON holds."""
    if world_size() == 1:
        return value
    return json.loads(gather_strings([json.dumps(value)] if is_main() else [])[0])


def barrier() -> None:
    """Wait for all processes."""
    any_flag(False)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one collective a device and dtype.

    A parameter that has a gradient in some processes only has zeros in the others; one that has
    none anywhere keeps none.
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
        means = flat.split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _number(name: str, least: int) -> int | None:
    """Return the whole number that a variable holds, None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ConfigError(
            f"{name} is {text!r} in the environment; expected a whole number from {least} on, as "
            "torchrun and srun set it"
        )
    return int(text)


def _meeting_place() -> tuple[str | None, int]:
    """Return host and port of rank 0 under srun, which names neither.

    (None, 0) where the environment has both.
    """
    if "MASTER_ADDR" in os.environ:
        port = _number("MASTER_PORT", 1)
        if port is None or port > 65535:
            raise ConfigError(
                f"MASTER_PORT is {port} in the environment and MASTER_ADDR is "
                f"{os.environ['MASTER_ADDR']!r}; expected a port, 1 to 65535, as torchrun sets it"
            )
        return None, 0
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if nodes is None:
        raise ConfigError(
            f"the environment says {world_size()} processes and names no MASTER_ADDR; expected "
            "torchrun or srun"
        )
    # node[07-09,12] or a,b: the first of them.
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert found is not None
    host = found[1] + (found[2] or "")
    job = _number("SLURM_JOB_ID", 0) or 0
    return host, _number("MASTER_PORT", 1) or 20000 + job % 20000
