"""Runs a function in several processes that find each other, for the operators' ``group``."""

from __future__ import annotations

import multiprocessing
import socket

import torch.multiprocessing

# What all of them import: once, by a server that forks them; each by itself took three seconds.
IMPORTED = ["torch.distributed", "pytest", "hypothesis", "ovseg_kernels"]


def spawn(function, ranks: int, *arguments: object) -> None:
    """``function(rank, ranks, port, *arguments)`` in ``ranks`` processes; raises what one raises."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(
        function, (ranks, port, *arguments), nprocs=ranks, start_method="forkserver"
    )
