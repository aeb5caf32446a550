"""The export to torch's own programs, with the operators that PT2E backends know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.export.arguments import arguments
from qframework.export.constants import Constants
from qframework.export.errors import ExportError, refuse, shortened
from qframework.export.formats import float8_of
from qframework.export.obstacles import check_export
from qframework.export.program import ExportSlot, trace
from qframework.export.session import Call, Session
from qframework.functional import ROUNDINGS, minifloat_quantize, upcast
from qframework.functional.straight_through import STEPS


def _operators() -> Any:
    return torch.ops.quantized_decomposed


def export_torch_qcdq(
    model: nn.Module,
    args: Any = None,
    export_path: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    input_t: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    export_weight_q_node: bool = False,
) -> torch.export.ExportedProgram:
    """Trace a model to operators of ``torch.ops.quantized_decomposed``.

    Weights and biases are buffers of integers with a dequantize operator. A zero point is added before rounding, as the
    quantizers do. Afterwards, and after an error, the model is as it was.

    Args:
        model: with quantized layers, calibrated; it is run in evaluation mode.
        args: positional arguments of a run, a tuple or one tensor.
        export_path: of a file by ``torch.export.save``; None for none.
        dynamic_shapes: as in ``torch.export.export``.
        input_shape: of an input of random numbers, in place of ``args``.
        input_t: an input, in place of ``args``.
        kwargs: keyword arguments of a run.
        export_weight_q_node: without effect: weights are integers.

    Returns:
        The program.

    Raises:
        ExportError: something stands in the way; all of it is named before anything is traced.
    """
    check_module(model, "export_torch_qcdq")
    given = arguments(args, input_shape, input_t, kwargs)
    refuse("torch QCDQ", check_export(model, "torch_qcdq"))
    program = torch_program(Session(model, given, kwargs), dynamic_shapes)
    if export_path is not None:
        try:
            torch.export.save(program, os.fspath(export_path))
        except Exception as error:
            raise shortened("torch.export.save", error) from error
    return program


def torch_program(session: Session, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    """The program of a recorded model."""
    return trace(session, TorchSlot, dynamic_shapes)


class TorchSlot(ExportSlot):
    """Calls torch's operators, with the constants as its buffers."""

    def __init__(self, slot: Any, session: Session) -> None:
        super().__init__(slot, session)
        for call in session.calls.get(slot.name, ()):
            c = call.constants
            suffix = c.name.removeprefix(c.slot).replace(".", "_")
            if f"scale{suffix}" not in self._buffers:
                device = c.record.value.device
                for name, t in _tensors(c).items():  # proxies have methods of such names
                    self._buffers[f"{name}{suffix}"] = t.to(device)

    def _held(self, c: Constants) -> _Held:
        suffix = c.name.removeprefix(c.slot).replace(".", "_")
        return _Held(self._buffers, suffix)

    def parameter(self, call: Call) -> Tensor:
        """The dequantized weight or bias."""
        c = call.constants
        held = self._held(c)
        if c.format == "minifloat":
            value = held["codes"].to(torch.float32) * held["scale"]
        elif c.group_size is not None or not _whole(c):
            scale, codes = held["scale"], held["codes"].to(c.scale.dtype)
            value = (codes if c.symmetric else codes - held["zero_point"]) * scale
        else:
            value = _dequantize(c, held["codes"], held)
        return value if value.dtype is c.dtype else value.to(c.dtype)

    def activation(self, call: Call, x: Tensor) -> Tensor:
        """The dequantized activation."""
        c = call.constants
        held = self._held(c)
        wide = upcast(x)
        if c.format == "minifloat":
            y = _minifloats(c, wide, held["scale"])
        else:
            codes = _quantize(c, wide, held)
            if _whole(c):
                y = _dequantize(c, codes, held)
            else:
                y = (codes.to(wide.dtype) - held["zero_point"]) * held["scale"]
        return y if y.dtype is x.dtype else y.to(x.dtype)


class _Held:
    """The buffers of one set of constants."""

    def __init__(self, buffers: Mapping[str, Tensor | None], suffix: str) -> None:
        self.buffers, self.suffix = buffers, suffix

    def __getitem__(self, name: str) -> Tensor:
        found = self.buffers[f"{name}{self.suffix}"]
        assert found is not None
        return found


def _whole(c: Constants) -> bool:
    return c.symmetric or c.whole_zero_point


def integer_dtype(c: Constants) -> torch.dtype:
    """The dtype of the integers."""
    low, high = min(c.low, 0), max(c.high, 0)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max and (low < 0) == (info.min < 0):
            return dtype
    if low >= 0 and high <= torch.iinfo(torch.int32).max:
        return torch.int32
    raise ExportError(f"{c.slot}: integers from {c.low} to {c.high} don't fit into 32 bits")


def _tensors(c: Constants) -> dict[str, Tensor]:
    """What a program holds of constants."""
    held = {"scale": c.spread(c.scale).clone(), "zero_point": c.spread(c.zero_point).clone()}
    if _by_channel(c):
        held["scales"] = c.along(c.scale).clone()
        held["zero_points"] = c.along(c.zero_point).long()
    if c.truncates is not None:
        names = ("divisor", "input_scale", "input_zero_point")
        held |= dict(zip(names, c.truncates[:3], strict=True))
    if c.format == "ternary":
        held["limit"] = c.threshold * c.scale
    if c.codes is not None and c.format == "minifloat":
        found = float8_of(c.exponent_bits, c.minifloat)
        held["codes"] = c.codes.to(found[1]) if found else c.codes
    elif c.codes is not None:
        held["codes"] = c.codes.to(integer_dtype(c))
    return held


def _by_channel(c: Constants) -> bool:
    return c.group_size is None and len(c.axes()) == 1 and c.format != "minifloat" and _whole(c)


def _bounds(c: Constants) -> tuple[int, int, torch.dtype]:
    return c.low, c.high, integer_dtype(c)


def _dequantize(c: Constants, codes: Tensor, held: _Held) -> Tensor:
    if len(c.axes()) > 1 or c.scale.dtype is torch.float64:
        return (codes.to(c.scale.dtype) - held["zero_point"]) * held["scale"]
    if c.axes():
        args = (codes, held["scales"], held["zero_points"], c.axes()[0])
        return _operators().dequantize_per_channel(*args, *_bounds(c))  # type: ignore[no-any-return]
    assert c.one_grid is not None
    one = (codes, c.one_grid[0], int(c.one_grid[1]))
    return _operators().dequantize_per_tensor(*one, *_bounds(c))  # type: ignore[no-any-return]


def _quantize(c: Constants, x: Tensor, held: _Held) -> Tensor:
    """The integers of ``x``."""
    steps: Tensor | None = None
    if c.truncates is not None:
        q = x / held["input_scale"] + held["input_zero_point"]
        steps = ROUNDINGS[c.rounding](torch.round(q) / held["divisor"])
    elif c.format == "binary":
        steps = STEPS["binary_sign"](x)
    elif c.format == "ternary":
        steps = torch.where(x.abs() > held["limit"], torch.sign(x), 0.0).to(x.dtype)
    elif not c.symmetric or len(c.axes()) > 1 or c.rounding != "round" or x.dtype is torch.float64:
        steps = x / held["scale"]
        steps = steps if c.symmetric else steps + held["zero_point"]
        steps = steps if c.rounding == "round" else ROUNDINGS[c.rounding](steps)
    if steps is not None and x.dtype is torch.float64:  # the operators take float32
        return torch.round(steps).clamp(c.low, c.high).to(integer_dtype(c))
    if steps is not None:
        return _operators().quantize_per_tensor(steps, 1.0, 0, *_bounds(c))  # type: ignore[no-any-return]
    if c.axes():
        args = (x, held["scales"], held["zero_points"], c.axes()[0])
        return _operators().quantize_per_channel(*args, *_bounds(c))  # type: ignore[no-any-return]
    assert c.one_grid is not None
    one = (x, c.one_grid[0], 0)
    return _operators().quantize_per_tensor(*one, *_bounds(c))  # type: ignore[no-any-return]


def _minifloats(c: Constants, x: Tensor, scale: Tensor) -> Tensor:
    """Minifloats times their scale: by a cast where torch has the format, else by arithmetic."""
    assert c.minifloat is not None
    found = float8_of(c.exponent_bits, c.minifloat)
    if found is None or not c.minifloat.saturates or c.rounding != "round":
        return minifloat_quantize.definition(x, scale, c.minifloat, c.rounding)
    largest = c.minifloat.largest
    return (x / scale).clamp(-largest, largest).to(found[1]).to(x.dtype) * scale
