"""The functions that each module of a model calls itself, found by tracing or by running an example."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from qframework.graph.forms import Forms
from qframework.graph.function_kinds import (
    BINARY,
    FUNCTIONS,
    METHODS,
    UNSIGNED,
    operands_of,
    settings_of,
)
from qframework.graph.input_sources import unsigned_nodes
from qframework.graph.module_shells import shell_tree
from qframework.graph.tracing import Site, call_site, trace

_CALL = nn.Module._call_impl.__code__


@dataclass(frozen=True)
class FunctionCall:
    """A place in code where a module calls a function.

    Attributes:
        kind: of the function.
        site: where.
        settings: arguments that a quantized layer for it is made with.
        unsigned: for each operand, whether it is never negative.
        residual: the operands are tensors of one shape, as far as is known.
    """

    kind: str
    site: Site
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    unsigned: tuple[bool, ...] = field(default=(), compare=False)
    residual: bool = field(default=True, compare=False)


@dataclass
class FunctionCalls:
    """The calls of all modules.

    Attributes:
        calls: of each module, in order.
        unknown: modules that can't be traced, and why.
    """

    calls: dict[nn.Module, list[FunctionCall]] = field(default_factory=dict)
    unknown: dict[nn.Module, str] = field(default_factory=dict)

    def add(self, module: nn.Module, call: FunctionCall) -> None:
        """Note a call; one place counts once."""
        known = self.calls.setdefault(module, [])
        if call not in known:
            known.append(call)


def innermost_module() -> Any:
    """The module whose forward is running, however many functions deep."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def without_place(kind: str, site: Site) -> str:
    """The kind of a call: ``x += y``, which torch calls ``add_``, binds its result like ``x + y``."""
    return "add" if kind == "add_" and site.operator else kind


def is_own(module: nn.Module) -> bool:
    """Whether a module's class is a user's, or made of one by torch.fx, with calls of its own to look at."""
    ours = type(module).__module__.startswith(("torch.", "qframework."))
    return not ours or isinstance(module, fx.GraphModule)


def traced_calls(model: nn.Module, forms: Forms) -> FunctionCalls:
    """What can be told without an input, by tracing each module's own forward."""
    found = FunctionCalls()
    for module in model.modules():
        if (
            not is_own(module)
            or forms.conversion(module) is not None
            or type(module).forward is _NO_FORWARD
        ):
            continue
        traced = trace(module, own=True)
        if isinstance(traced, str):
            found.unknown[module] = traced
            continue
        unsigned = unsigned_nodes(traced)
        for node in traced.graph.nodes:
            kind = (FUNCTIONS if node.op == "call_function" else METHODS).get(node.target)
            if not node.op.startswith("call_") or node.op == "call_module" or kind is None:
                continue
            operands = operands_of(kind, node.args, node.kwargs)
            if kind in BINARY and not all(isinstance(o, fx.Node) for o in operands):
                continue
            signs = tuple(isinstance(o, fx.Node) and unsigned[o] for o in operands)
            settings = settings_of(kind, node.args, node.kwargs)
            residual = all(isinstance(o, fx.Node) and _depends_on_input(o) for o in operands)
            found.add(module, FunctionCall(kind, traced.sites[node], settings, signs, residual))
    return found


_NO_FORWARD = nn.Module.forward


def _depends_on_input(node: fx.Node) -> bool:
    waiting, done = [node], set[fx.Node]()
    while waiting:
        found = waiting.pop()
        if found.op in ("placeholder", "call_module"):
            return True
        if found not in done:
            done.add(found)
            waiting += found.all_input_nodes
    return False


class Recorder(TorchFunctionMode):
    """Notes the calls of functions while it is active."""

    def __init__(self, found: FunctionCalls, names: dict[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.found, self.names = found, names
        self.never_negative: dict[int, Tensor] = {}  # kept alive: an id may come again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call, then make it."""
        kwargs = kwargs or {}
        kind = FUNCTIONS.get(func)
        result = func(*args, **kwargs)
        if kind is None:
            return result
        operands = operands_of(kind, args, kwargs)
        module = self.names.get(innermost_module())
        if module is not None and is_own(module):
            self._note(module, kind, operands, args, kwargs)
        if kind in UNSIGNED and isinstance(result, Tensor):
            self.never_negative[id(result)] = result
        return result

    def _note(
        self, module: nn.Module, kind: str, operands: Sequence[Any], args: Any, kwargs: Any
    ) -> None:
        tensors = [o for o in operands if isinstance(o, Tensor) and o.is_floating_point()]
        if len(tensors) < len(operands) and (kind in BINARY or not tensors):
            return
        unsigned = tuple(id(o) in self.never_negative for o in operands)
        residual = len({t.shape for t in tensors}) == 1
        settings = settings_of(kind, args, kwargs)
        site = call_site()
        kind = without_place(kind, site)
        self.found.add(module, FunctionCall(kind, site, settings, unsigned, residual))


def run_calls(model: nn.Module, example_input: tuple[Any, ...]) -> FunctionCalls:
    """What an example shows; the model stays as it is."""
    stands: dict[nn.Module, nn.Module] = {}
    shells = shell_tree(model, stands)
    found = FunctionCalls()
    names = {new: old for old, new in stands.items()}
    with torch.random.fork_rng(), torch.no_grad(), Recorder(found, names):
        shells.eval()(*example_input)
    return found
