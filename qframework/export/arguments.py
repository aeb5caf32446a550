"""The arguments of a run, and which of their axes may vary, in the forms in which users give them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qframework.export.errors import ExportError


def arguments(
    args: Any, input_shape: Sequence[int] | None, input_t: Any, kwargs: Mapping[str, Any] | None
) -> Any:
    """The arguments of a run, from one of the ways to give them.

    Raises:
        ExportError: none of them, or several.
    """
    given = [a for a in (args, input_shape, input_t) if a is not None]
    if len(given) > 1 or (not given and not kwargs):
        raise ExportError(
            "give the arguments of one run: args=(x,), or input_t=x, or input_shape=(1, 3, 32, 32); exactly one of them"
        )
    if input_shape is not None:
        return (torch.randn(*input_shape),)
    chosen = args if args is not None else input_t
    return () if chosen is None else chosen


def shapes_of(
    model: nn.Module,
    args: Any,
    dynamic_shapes: Any,
    dynamic_axes: Mapping[str, Any] | None,
    input_names: Sequence[str] | None,
) -> Any:
    """Dynamic shapes, from either form in which they are given.

    Raises:
        ExportError: both forms, or an axis of an input that isn't there.
    """
    if dynamic_axes is None:
        return dynamic_shapes
    if dynamic_shapes is not None:
        raise ExportError("give dynamic_shapes or dynamic_axes, not both")
    count = len(args) if isinstance(args, (tuple, list)) else 1
    names = list(inspect.signature(model.forward).parameters)[:count]
    given = list(input_names or names)
    shapes: list[Any] = []
    for i in range(count):
        axes = next((dynamic_axes[n] for n in (given[i], names[i]) if n in dynamic_axes), None)
        held = {int(a): torch.export.Dim.DYNAMIC for a in (axes or ())}
        shapes.append(held or None)
    return tuple(shapes)
