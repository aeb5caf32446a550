"""Modules whose parameters code reads past them, for passes that need no graph: told by a trace or the source, and by a run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from qframework.graph.function_calls import innermost_module
from qframework.graph.graph_leaves import is_leaf
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.single_layers import traced_whole
from qframework.graph.weight_forms import ReadQuantized
from qframework.graph.weight_readers import has_own_code, readers_in_source

#: Classes of layers, the own code of which may read their parameters.
_LAYERS = (*WEIGHTED, nn.Embedding)


def read_by_code(model: nn.Module) -> set[nn.Module]:
    """Modules that hold a parameter, or have a part that holds one, which code of other modules reads.

    Found in the model's graph; where it can't be traced, in the source. :func:`noting_reads` finds what neither shows.

    Args:
        model: any module.
    """
    made_for_readers = {m for m in model.modules() if isinstance(m, ReadQuantized)}
    traced = traced_whole(model, lambda m: is_leaf(m) or isinstance(m, _LAYERS))
    if isinstance(traced, str):
        return made_for_readers | _holders(
            model, (p for m in readers_in_source(model) for p in _held(m))
        )
    return made_for_readers | _holders(model, traced.read)


@contextmanager
def noting_reads(model: nn.Module, found: set[nn.Module]) -> Iterator[None]:
    """Note modules as :func:`read_by_code` does, while the model runs.

    Args:
        model: that runs.
        found: gets what is found.
    """
    mode = _Reads(model)
    try:
        with mode:
            yield
    finally:
        found |= _holders(model, mode.read)


def _held(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a module computes with itself."""
    parts = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
    return module.parameters(recurse=parts)


def _holders(model: nn.Module, read: Iterable[nn.Parameter]) -> set[nn.Module]:
    """The modules that compute with some of the parameters."""
    found = set(read)
    return {m for m in model.modules() if not found.isdisjoint(_held(m))}


def memory_of(x: Tensor) -> int:
    """Where a tensor's memory is; 0 for one that has none."""
    try:
        return 0 if x.is_meta else x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of a class without memory of its own
        return 0


class _Reads(TorchFunctionMode):
    """Notes parameters that a user's code hands to functions, outside of the modules that hold them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: set[nn.Parameter] = set()
        self.at: dict[int, set[nn.Parameter]] = {}
        self.readers: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            within = set(module.modules())
            for parameter in _held(module):
                place = memory_of(parameter)
                self.at.setdefault(place, set()).add(parameter)
                self.readers.setdefault(place, set()).update(within)
        self.at.pop(0, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands, then call the function."""
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            for given in (*args, *kwargs.values()):
                for x in given if isinstance(given, (tuple, list)) else (given,):
                    if isinstance(x, Tensor):
                        self._look(x)
        return func(*args, **kwargs)

    def _look(self, x: Tensor) -> None:
        place = memory_of(x)
        if place not in self.at or self.at[place] <= self.read:
            return
        reader = innermost_module()
        if reader is None or not has_own_code(reader) or reader in self.readers[place]:
            return
        if not _is_ours():
            self.read |= self.at[place]


def _is_ours() -> bool:
    """Whether a hook of ours calls the function, rather than a module's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and not name.startswith("torch."):
            return name.startswith("qframework.")
        frame = frame.f_back
    return False
