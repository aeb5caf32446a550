"""The parameters that a quantizer takes its statistics from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.function_wrapper import Identity


class TrackedParameters(Sequence[Any]):
    """A live, read-only list of ``module.weight`` (or ``.bias``) over the layers that share a quantizer.

    It holds the layers and looks their parameters up at every access: one that is assigned anew, moved or
    loaded is seen at once.

    Args:
        modules: the layers; the list is shared with the caller, who may add to it.
        name: attribute of the layers.
    """

    def __init__(self, modules: list[nn.Module], name: str) -> None:
        self.modules, self.name = modules, name

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: Any) -> Any:
        return self._of(self.modules[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._of(m) for m in self.modules)

    def _of(self, module: Any) -> Any:
        # A layer may give others something else by that name.
        tracked = getattr(type(module), "tracked_parameter", None)
        return getattr(module, self.name) if tracked is None else tracked(module, self.name)


def tracked_view(
    parameters: Sequence[Tensor], view: nn.Module | None, concat_dim: int | None
) -> Tensor:
    """All parameters, each shaped by ``view``, joined along ``concat_dim``."""
    view = view or Identity()
    views = [view(p) for p in parameters]
    return views[0] if len(views) == 1 else torch.cat(views, dim=concat_dim or 0)
