"""A device that is only said to be one: ``cpu:0`` beside ``cpu``, whose tensors can't meet those of the other."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

THERE = torch.device("cpu", 0)
_BRING = {"copy_", "__setitem__", "__set__", "_has_compatible_shallow_copy_type"}


class FakeDevice(TorchFunctionMode):
    """Tensors that were moved to ``cpu:0``, and all that is computed from them, are there until they are moved back.

    Functions that get tensors of both places raise, but for numbers and copies, as those of accelerators do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, object] = {}  # kept, so that no other one comes where it was

    def has(self, t: Tensor) -> bool:
        """Whether a tensor is there."""
        return t.numel() > 0 and t.untyped_storage().data_ptr() in self._storages

    def holds(self, module: nn.Module) -> bool:
        """Whether any tensor of a module is there."""
        return any(self.has(t) for t in [*module.parameters(), *module.buffers()])

    def _put(self, what):
        for t in _tensors(what):
            if t.numel():
                storage = t.untyped_storage()
                self._storages[storage.data_ptr()] = storage
        return what

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = _tensors((args, kwargs))
        if func == Tensor.device.__get__:
            return THERE if self.has(args[0]) else func(*args)
        if func is Tensor.to or name == "cpu":
            return self._move(func, args, kwargs)
        there = [t for t in given if self.has(t)]
        here = [t for t in given if not self.has(t) and t.dim() and t.numel()]
        is_place = name == "__getitem__" and self.has(args[0])  # places may be on the CPU
        if there and here and name not in _BRING and not is_place:
            raise RuntimeError(f"{name}: tensors on two devices, {[tuple(t.shape) for t in given]}")
        asked = kwargs.get("device")
        found = func(*args, **kwargs)
        if name in ("copy_", "__setitem__", "__set__"):
            return found
        if (there and asked is None) or (asked is not None and torch.device(asked) == THERE):
            self._put(found)
        return found

    def _move(self, func, args, kwargs):
        device = kwargs.get("device")
        for arg in args[1:]:
            if isinstance(arg, Tensor):
                device = THERE if self.has(arg) else arg.device
            elif isinstance(arg, (str, torch.device)):
                with suppress(RuntimeError):
                    device = torch.device(arg)
        if getattr(func, "__name__", "") == "cpu":
            device = torch.device("cpu")
        goes = self.has(args[0]) if device is None else torch.device(device) == THERE
        found = func(*args, **kwargs)
        if goes != self.has(args[0]) or (goes and not self.has(found)):
            found = (
                found.clone()
                if found.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
                else found
            )
        return self._put(found) if goes else found


def _tensors(what) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(what) if isinstance(t, Tensor) and not t.is_meta]
