"""The state of modules at one time, to go back to when what follows fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HELD = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What a module and all below it hold: the same tensors, parts and settings, with the same contents.

    Args:
        module: of any class.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [
            (m, dict(vars(m)), [dict(vars(m)[name]) for name in _HELD]) for m in module.modules()
        ]
        self._contents = [(t, t.detach().clone()) for t in _tensors(module)]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back."""
        for module, attributes, held in self._modules:
            own = vars(module)
            own.clear()
            own.update(attributes)
            for name, before in zip(_HELD, held, strict=True):
                own[name].clear()
                own[name].update(before)
        for tensor, contents in self._contents:
            if tensor.dtype is not contents.dtype or tensor.device != contents.device:
                tensor.data = contents.clone()
            elif not tensor.is_meta:
                tensor.copy_(contents)


@contextmanager
def unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """Let a module and all below it be as they were before, where an exception leaves the block.

    Args:
        module: of any class.
    """
    before = Snapshot(module)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
