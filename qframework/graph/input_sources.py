"""Where the inputs of layers come from: which are on the grid of an activation already, which are never negative."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qframework.graph.tracing import Traced

_KEEPING_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.UpsamplingNearest2d,
)  # fmt: skip
_KEEPING_FUNCTIONS = (
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.split, torch.chunk, F.max_pool1d,
    F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, F.dropout, F.dropout2d, operator.getitem,
)  # fmt: skip
_KEEPING_METHODS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "clone",
        "expand",
        "narrow",
        "t",
        "split",
        "chunk",
        "unbind",
    ]
)
_UNSIGNED_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_UNSIGNED_FUNCTIONS = (
    F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, torch.sigmoid, F.sigmoid, F.hardsigmoid, F.softmax, torch.softmax,
)  # fmt: skip
_UNSIGNED_METHODS = frozenset(["relu", "relu_", "sigmoid", "softmax"])
#: Functions whose result has no negative element where their operands have none.
_SIGN_KEEPING_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_SIGN_KEEPING_FUNCTIONS = (
    torch.cat, torch.add, torch.mul, torch.mean, torch.div, operator.add, operator.iadd, operator.mul,
    operator.imul, operator.truediv, F.avg_pool2d, F.adaptive_avg_pool2d, torch.stack,
)  # fmt: skip
_SIGN_KEEPING_METHODS = frozenset(["mean", "add", "add_", "mul", "mul_", "sum", "div", "div_"])
_BINARY = (
    torch.add, torch.mul, torch.div, operator.add, operator.iadd, operator.mul, operator.imul, operator.truediv, "add",
    "add_", "mul", "mul_", "div", "div_",
)  # fmt: skip
_CLAMPS = (torch.clamp, torch.clamp_, torch.clip, F.hardtanh, "clamp", "clamp_", "clip", "clip_")

#: From a module that is called to the one that gives its result.
LastStep = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class InputSource:
    """Where the input of a layer comes from.

    Attributes:
        activation: the module whose result reaches the layer unchanged, or merely moved; None for all others.
        unsigned: no element is negative.
    """

    activation: nn.Module | None
    unsigned: bool


def _itself(module: nn.Module) -> nn.Module:
    return module


def input_sources(
    graphs: Iterable[Traced], last_step: LastStep = _itself
) -> dict[nn.Module, InputSource]:
    """For each module that is called the source of its first argument; where calls disagree, nothing is known.

    Args:
        graphs: of a model, or of its modules.
        last_step: the module that gives the result of one.
    """
    found: dict[nn.Module, InputSource] = {}
    for traced in graphs:
        unsigned = unsigned_nodes(traced, last_step)
        for node in traced.graph.nodes:
            layer = traced.called(node)
            if layer is None or not node.args or not isinstance(node.args[0], fx.Node):
                continue
            before = node.args[0]
            source = InputSource(_origin(before, traced, last_step), unsigned[before])
            known = found.setdefault(layer, source)
            if known != source:
                same = known.activation is source.activation
                found[layer] = InputSource(
                    known.activation if same else None, known.unsigned and source.unsigned
                )
    return found


def unsigned_nodes(traced: Traced, last_step: LastStep = _itself) -> dict[fx.Node, bool]:
    """For each node whether its result is never negative."""
    unsigned: dict[fx.Node, bool] = {}
    for node in traced.graph.nodes:
        unsigned[node] = _is_unsigned(node, traced, unsigned, last_step)
    return unsigned


def _is(module: Any, kinds: tuple[type, ...]) -> bool:
    return type(module) in kinds


def _operands(node: fx.Node) -> list[Any]:
    """Tensors, as far as can be told, and numbers that a function combines."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)):
        return list(first)
    binary = node.target in _BINARY
    return list(node.args[:2]) if binary else [first]


def _is_unsigned(
    node: fx.Node, traced: Traced, known: dict[fx.Node, bool], last_step: LastStep
) -> bool:
    module = traced.called(node)
    if module is not None:
        module = last_step(module)
        if _is(module, _UNSIGNED_MODULES):
            return True
        keeps = _is(module, _KEEPING_MODULES + _SIGN_KEEPING_MODULES)
    elif node.op == "call_function":
        if node.target in _UNSIGNED_FUNCTIONS:
            return True
        keeps = node.target in _KEEPING_FUNCTIONS + _SIGN_KEEPING_FUNCTIONS
    elif node.op == "call_method":
        if node.target in _UNSIGNED_METHODS:
            return True
        keeps = node.target in _KEEPING_METHODS | _SIGN_KEEPING_METHODS
    else:
        return False
    if node.target in _CLAMPS and _not_below_zero(node):
        return True
    return keeps and all(
        known.get(o, False) if isinstance(o, fx.Node) else isinstance(o, (int, float)) and o >= 0
        for o in _operands(node)
    )


def _not_below_zero(node: fx.Node) -> bool:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    return isinstance(low, (int, float)) and low >= 0


def _origin(node: Any, traced: Traced, last_step: LastStep) -> nn.Module | None:
    """The module whose result this is, through what keeps elements."""
    while isinstance(node, fx.Node):
        module = traced.called(node)
        if module is not None and not _is(last_step(module), _KEEPING_MODULES):
            return last_step(module)
        keeps = (
            module is not None
            or (node.op == "call_function" and node.target in _KEEPING_FUNCTIONS)
            or (node.op == "call_method" and node.target in _KEEPING_METHODS)
        )
        if not keeps or not node.args:
            return None
        node = node.args[0]
    return None
