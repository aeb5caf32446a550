"""One run of a model in evaluation, and what its quantizers computed in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qframework.export.constants import Constants
from qframework.export.errors import ExportError, Obstacle, refuse
from qframework.export.reading import Unreadable, constants_of
from qframework.export.slots import InSlot, Slot, in_evaluation, replaced, slots_of
from qframework.proxy.base import ScaleSource
from qframework.quant_tensor import dequantize


class Call:
    """One call of a slot.

    Attributes:
        name: of the call: that of its slot, from the second call on with ``#1``, ``#2`` and so on.
        slot: the slot.
        constants: of the call, which other calls of the slot may have too.
        value: that was returned; None unless values are kept.
    """

    def __init__(self, name: str, slot: Slot, constants: Constants, value: Tensor | None) -> None:
        self.name, self.slot, self.constants, self.value = name, slot, constants, value


class Session:
    """A model, its arguments, and the calls of its quantizers in one run in evaluation.

    Args:
        model: to run.
        args: positional arguments, a tuple; one tensor stands for a tuple of it.
        kwargs: keyword arguments.
        keep_values: whether calls keep what was returned.

    Attributes:
        calls: of each slot, in the order of its name.
        order: all calls as they came.
        output: of the run, with quantized tensors as their values.

    Raises:
        ExportError: nothing is quantized, or a quantizer computes what can't be said by constants.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any] | None = None,
        keep_values: bool = False,
    ) -> None:
        self.model = model
        self.args: tuple[Any, ...] = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        self.kwargs = dict(kwargs or {})
        self.slots = slots_of(model)
        self.calls: dict[str, list[Call]] = {}
        self.order: list[Call] = []
        self.keep_values = keep_values
        self._obstacles: dict[tuple[str, str], Obstacle] = {}
        self._sources: list[tuple[Constants, object]] = []
        if not self.slots:
            raise ExportError(
                f"{type(model).__name__}: nothing in this model is quantized; quantize it first, with layers of "
                "qframework.layers or qframework.graph.quantize_model"
            )
        with in_evaluation(model), replaced(self.slots, self._recorder), torch.no_grad():
            out = dequantize(model(*self.args, **self.kwargs))
        self.output = pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, out)
        refuse("export", list(self._obstacles.values()))
        if not self.order:
            raise ExportError(
                f"{type(model).__name__}: none of its quantizers was called by a run with these arguments"
            )

    def _recorder(self, slot: Slot) -> nn.Module:
        return _Recorder(slot, self)

    def see(self, slot: Slot, args: tuple[Any, ...], out: Any) -> None:
        """Take down a call."""
        if out is None:  # a bias that isn't there
            return
        try:
            found = constants_of(slot.name, slot.proxy, args, out)
        except Unreadable as why:
            of = (slot.layer, slot.tensor, slot.proxy.quantizer.__name__)
            self._obstacles[(slot.name, why.reason)] = Obstacle(*of, why.reason, why.remedy)
            return
        before = self.calls.setdefault(slot.name, [])
        same = next((c.constants for c in before if _same(c.constants, found)), None)
        if same is None:
            kinds = len({id(c.constants) for c in before})
            if kinds:
                found.name = f"{slot.name}.{kinds}"
            same = found
        name = f"{slot.name}#{len(before)}" if before else slot.name
        call = Call(
            name, slot, same, out.value.detach().cpu().clone() if self.keep_values else None
        )
        before.append(call)
        self.order.append(call)

    def source_of(self, constants: Constants) -> object:
        """The source of a scale: equal for equal scales, as an export can't look at them."""
        for other, source in self._sources:
            if other is constants:
                return source
            if _same_scale(other, constants):
                if _same_grid(other, constants):
                    return source
                return ("scale", source)
        source = ScaleSource()
        self._sources.append((constants, source))
        return source

    def call(self, name: str) -> Call:
        """A call by its name."""
        slot, _, number = name.partition("#")
        return self.calls[slot][int(number or 0)]


class _Recorder(InSlot):
    """Calls the proxy of a slot, and tells a session."""

    def __init__(self, slot: Slot, session: Session) -> None:
        super().__init__(slot)
        self.__dict__["_session"] = (session,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the proxy returns."""
        out = self.slot.proxy(*args, **kwargs)
        self.__dict__["_session"][0].see(self.slot, args, out)
        return out


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


def _same(a: Constants, b: Constants) -> bool:
    """Whether two calls of one slot computed the same."""
    if not (_equal(a.scale, b.scale) and _equal(a.zero_point, b.zero_point)):
        return False
    if not _equal(a.codes, b.codes) or (a.truncates is None) is not (b.truncates is None):
        return False
    if len(a.shape) != len(b.shape):
        return False
    for mine, other in zip(a.truncates or (), b.truncates or (), strict=True):
        if isinstance(mine, Tensor) and not _equal(mine, other):  # type: ignore[arg-type]
            return False
    return (a.low, a.high, a.signed, a.dtype) == (b.low, b.high, b.signed, b.dtype)


def _same_scale(a: Constants, b: Constants) -> bool:
    return a.scale.shape == b.scale.shape and torch.allclose(a.scale, b.scale)


def _same_grid(a: Constants, b: Constants) -> bool:
    same = _equal(a.zero_point, b.zero_point)
    return same and (a.low, a.high, a.signed) == (b.low, b.high, b.signed)
