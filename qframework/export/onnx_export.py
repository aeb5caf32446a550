"""The ONNX exports."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qframework.arguments import check_module
from qframework.export.arguments import arguments, shapes_of
from qframework.export.errors import ExportError, Obstacle, refuse
from qframework.export.obstacles import DEFAULT_OPSET, check_export
from qframework.export.onnx_file import onnx_model, save
from qframework.export.qcdq import QCDQ
from qframework.export.qonnx import QONNX
from qframework.export.session import Session
from qframework.inject.errors import did_you_mean

if TYPE_CHECKING:
    import onnx

#: Keywords of torch.onnx.export, and of the reference library, that change nothing here.
_WITHOUT_EFFECT = frozenset(
    [
        "disable_warnings",
        "do_constant_folding",
        "dynamo",
        "export_params",
        "export_weight_q_node",
        "external_data",
        "fallback",
        "keep_initializers_as_inputs",
        "profile",
        "report",
        "verbose",
        "verify",
    ]
)
_OPSETS = (20, 25)


def export_onnx_qcdq(
    model: nn.Module,
    args: Any = None,
    export_path: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    input_t: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset_version: int | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    standard: bool = False,
    optimize: bool = True,
    **others: Any,
) -> onnx.ModelProto:
    """Write a model as ONNX with QuantizeLinear, Clip and DequantizeLinear.

    Weights and biases are in the file as integers (or float8). A zero point is added before rounding, as the quantizers do, by
    ``Div, Add, QuantizeLinear(1, 0)``. Afterwards, and after an error, the model is as it was.

    Args:
        model: with quantized layers, calibrated; it is run in evaluation mode.
        args: positional arguments of a run, a tuple or one tensor.
        export_path: of the file, which is all that is written; None for none.
        input_shape: of an input of random numbers, in place of ``args``.
        input_t: an input, in place of ``args``.
        kwargs: keyword arguments of a run.
        opset_version: 20 to 25; 21 has int4, 16 bits and groups, 25 has int2. 20 where None.
        dynamic_shapes: as in ``torch.export.export``.
        dynamic_axes: as in ``torch.onnx.export``, by the names of the inputs, in place of ``dynamic_shapes``.
        input_names: of the graph, in the order of the arguments.
        output_names: of the graph.
        standard: write zero points as one QuantizeLinear, which rounds before it adds them: ties then differ where they are odd.
        optimize: fold constants, and remove what nothing needs.
        **others: further keywords of ``torch.onnx.export``, without effect here.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        ExportError: something stands in the way; all of it is named before anything is traced.
        TypeError: an unknown keyword.
    """
    check_module(model, "export_onnx_qcdq")
    _known(others)
    opset = DEFAULT_OPSET if opset_version is None else _opset(opset_version)
    given = arguments(args, input_shape, input_t, kwargs)
    refuse("ONNX QCDQ", check_export(model, "onnx_qcdq", opset))
    session = Session(model, given, kwargs)
    refuse("ONNX QCDQ", found_by_run(session))
    shapes = shapes_of(model, given, dynamic_shapes, dynamic_axes, input_names)
    dialect = QCDQ(opset, standard)
    proto = onnx_model(session, dialect, opset, shapes, input_names, output_names, optimize)
    save(proto, export_path)
    return proto


def export_qonnx(
    model: nn.Module,
    args: Any = None,
    export_path: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    input_t: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset_version: int | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = True,
    **others: Any,
) -> onnx.ModelProto:
    """Write a model as QONNX: Quant, BipolarQuant, Trunc and FloatQuant of ``qonnx.custom_op.general``, version 2.

    Weights and biases are their dequantized values, each with a Quant behind it. Afterwards, and after an error, the model
    is as it was.

    Args:
        model: with quantized layers, calibrated; it is run in evaluation mode.
        args: positional arguments of a run, a tuple or one tensor.
        export_path: of the file, which is all that is written; None for none.
        input_shape: of an input of random numbers, in place of ``args``.
        input_t: an input, in place of ``args``.
        kwargs: keyword arguments of a run.
        opset_version: of ONNX's own nodes, 20 to 25; 20 where None.
        dynamic_shapes: as in ``torch.export.export``.
        dynamic_axes: as in ``torch.onnx.export``, by the names of the inputs, in place of ``dynamic_shapes``.
        input_names: of the graph, in the order of the arguments.
        output_names: of the graph.
        optimize: fold constants, and remove what nothing needs.
        **others: further keywords of ``torch.onnx.export``, without effect here.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        ExportError: something stands in the way; all of it is named before anything is traced.
        TypeError: an unknown keyword.
    """
    check_module(model, "export_qonnx")
    _known(others)
    opset = DEFAULT_OPSET if opset_version is None else _opset(opset_version)
    given = arguments(args, input_shape, input_t, kwargs)
    refuse("QONNX", check_export(model, "qonnx"))
    session = Session(model, given, kwargs)
    refuse("QONNX", in_float64(session))
    shapes = shapes_of(model, given, dynamic_shapes, dynamic_axes, input_names)
    proto = onnx_model(session, QONNX(), opset, shapes, input_names, output_names, optimize)
    save(proto, export_path)
    return proto


def in_float64(session: Session) -> list[Obstacle]:
    """Values that ONNX's quantizers don't take."""
    found = {}
    for call in session.order:
        if call.constants.dtype is torch.float64:
            slot, reason = call.slot, "values in float64, and Quant takes float32"
            of = (slot.layer, slot.tensor, slot.proxy.quantizer.__name__)
            found[slot.name] = Obstacle(*of, reason, "convert the model: model.float()")
    return list(found.values())


def found_by_run(session: Session) -> list[Obstacle]:
    """What QuantizeLinear can't hold, and only a run tells."""
    found = {}
    for call in session.order:
        c, slot = call.constants, call.slot
        of = (slot.layer, slot.tensor, slot.proxy.quantizer.__name__)
        if c.group_size is None and len(c.axes()) > 1:
            reason = f"scales that vary along the axes {c.axes()}"
            found[slot.name] = Obstacle(*of, reason, "give one scale, or one for each channel")
        elif c.group_size is not None and c.shape[c.group_dim] % c.group_size:
            size, length = c.group_size, c.shape[c.group_dim]
            reason = f"groups of {size} that don't divide the {length} elements of their axis"
            found[slot.name] = Obstacle(*of, reason, "give a group_size that does, or use QONNX")
        elif c.group_size is not None and not (c.symmetric or c.whole_zero_point):
            reason = "groups whose zero points are no integers"
            found[slot.name] = Obstacle(*of, reason, "let zero points be rounded, or use QONNX")
    return [*in_float64(session), *found.values()]


def _known(others: Mapping[str, Any]) -> None:
    unknown = sorted(set(others) - _WITHOUT_EFFECT)
    if unknown:
        known = {*inspect.signature(export_onnx_qcdq).parameters, *_WITHOUT_EFFECT} - {"others"}
        hint = did_you_mean(unknown[0], known)
        raise TypeError(f"unknown keyword{'s' * (len(unknown) > 1)} {', '.join(unknown)}{hint}")


def _opset(version: int) -> int:
    low, high = _OPSETS
    if not isinstance(version, int) or isinstance(version, bool):
        raise ExportError(
            f"opset_version={version!r} is a {type(version).__name__}; allowed are the whole numbers {low} to {high}"
        )
    if (
        version < low
    ):  # as programs for the reference library ask for 13, which has no dynamo export
        return low
    if version > high:
        raise ExportError(f"opset_version={version}; allowed are {low} to {high}")
    return version
