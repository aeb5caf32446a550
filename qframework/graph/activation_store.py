"""Where activations between blocks are: in memory, on the CPU, or in memory-mapped files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qframework.graph.block_plan import map_tensors


class ActivationStore:
    """Keeps nested tensors.

    Args:
        place: False for where they are, True for the CPU, a folder for files that are mapped into memory and removed when they
            aren't needed any longer.
    """

    def __init__(self, place: bool | str | Path = False) -> None:
        self.folder = None if isinstance(place, bool) else Path(place)
        self.to_cpu = place is True
        self._count = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, what: Any) -> Any:
        """The same elsewhere."""
        if self.folder is None and not self.to_cpu:
            return what
        return map_tensors(self._moved, what)

    def _moved(self, t: Tensor) -> Tensor:
        if self.folder is None:
            return t.to("cpu")
        if t.numel() == 0 or t.is_meta:
            return t
        self._count += 1
        file = self.folder / f"activation-{os.getpid()}-{id(self)}-{self._count}"
        size = t.numel()
        mapped = torch.from_file(str(file), shared=True, size=size, dtype=t.dtype)
        mapped.copy_(t.detach().reshape(-1).to("cpu"))
        file.unlink()  # the mapping stays until the tensor is gone
        return mapped.reshape(t.shape)


def moved(what: Any, device: Any) -> Any:
    """Nested tensors on another device; None for none."""
    return what if device is None else map_tensors(lambda t: t.to(device), what)
