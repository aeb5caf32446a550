"""How much memory the tensors take that are made while a context is entered."""

import weakref

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors, those of memory-mapped files aside.

    Attributes:
        now: of tensors that are there.
        peak: the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        mapped = func is torch.ops.aten.from_file.default
        for t in _tensors(output):
            storage = t.untyped_storage()
            if id(storage) not in self._known and id(storage) not in given:
                self._add(storage, 0 if mapped else storage.nbytes())
        return output

    def _add(self, storage, size: int) -> None:
        key = id(storage)

        def gone(_) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(what) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(what) if isinstance(t, Tensor) and not t.is_meta]


def size_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
