"""Real processes, of gloo, that run functions together; they start once, since that takes most of the time."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=90))
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(rank, size, *args), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Processes:
    """A group of processes.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self.size, port = size, _free_port()
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(r, size, port, self.tasks[r], self.results))
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, size, *args)``, of a module, returns in each; plain Python objects."""
        for queue in self.tasks:
            queue.put((function, args))
        found: dict[int, Any] = {}
        for _ in range(self.size):
            rank, result, error = self.results.get(timeout=150)
            if error is not None:
                raise RuntimeError(f"process {rank}: {error}")
            found[rank] = result
        return [found[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End them."""
        for queue in self.tasks:
            queue.put(None)
        for process in self.processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
