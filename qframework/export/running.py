"""Runs a traced program node by node, with numbers of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from qframework.export.program import call_of
from qframework.export.session import Call, Session


class Runner:
    """Base: subclasses say what a number is, and what a quantizer and a function make of it.

    Args:
        program: in which quantizers are nodes.
        session: with their calls.
    """

    def __init__(self, program: torch.export.ExportedProgram, session: Session) -> None:
        self.program, self.session = program, session
        self._inputs = {s.arg.name: s for s in program.graph_signature.input_specs}

    def held(self, t: Tensor) -> Any:
        """The number for a parameter, a buffer or an input."""
        raise NotImplementedError

    def quantizer(self, call: Call, x: Any) -> Any:
        """What a quantizer makes of ``x``; of nothing, the weight or bias."""
        raise NotImplementedError

    def function(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What another function gives."""
        raise NotImplementedError

    def execute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The outputs, flat.

        Args:
            args: positional arguments of the model.
            kwargs: its keyword arguments.
        """
        given = iter(pytree.tree_leaves((tuple(args), dict(kwargs))))
        values: dict[torch.fx.Node, Any] = {}
        result: list[Any] = []
        last = _last_uses(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(node, given)
            elif node.op == "output":
                result = [self._of(values, a) for a in node.args[0]]
            elif node.op == "get_attr":
                values[node] = self.held(getattr(self.program.graph_module, str(node.target)))
            else:
                values[node] = self._called(node, values)
            for done in last.get(node, ()):
                values.pop(done, None)
        return result

    def _called(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
        name = call_of(node)
        if name is not None:
            inputs: Any = self._of(values, node.args[0])
            return self.quantizer(self.session.call(name), inputs[0] if inputs else None)
        args, kwargs = self._of(values, node.args), self._of(values, node.kwargs)
        return self.function(node, tuple(args), dict(kwargs))

    @staticmethod
    def _of(values: dict[torch.fx.Node, Any], structure: Any) -> Any:
        return torch.fx.node.map_arg(structure, lambda n: values[n])

    def _placeholder(self, node: torch.fx.Node, given: Any) -> Any:
        spec = self._inputs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            value = next(given)
            return self.held(value) if isinstance(value, Tensor) else value
        for place in (self.program.state_dict, self.program.constants):
            if spec.target in place:
                return self.held(place[spec.target].detach())  # type: ignore[union-attr]
        raise KeyError(spec.target)


def _last_uses(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """For each node those that it uses as the last one."""
    seen: set[torch.fx.Node] = set()
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                found.setdefault(node, []).append(used)
    return found


def function_name(node: torch.fx.Node) -> str:
    """The name of the function that a node calls, ``"linear"``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.partition("::")[2])
    return getattr(target, "__name__", str(target))


def layer_of(node: torch.fx.Node) -> str:
    """Qualified name of the innermost module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def in_double(value: Any) -> Any:
    """Floating-point tensors and dtypes become those of float64, devices the CPU."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def computed(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    """What a function gives for tensors, floats in float64."""
    args = pytree.tree_map(in_double, args)
    kwargs = {k: pytree.tree_map(in_double, v) for k, v in kwargs.items()}
    target: Any = node.target
    value = node.meta.get("val")
    if function_name(node) == "rms_norm" and len(args) < 4 and isinstance(value, Tensor):
        kwargs.setdefault("eps", torch.finfo(value.dtype).eps)  # that of the model, not of float64
    return pytree.tree_map(in_double, target(*args, **kwargs))
