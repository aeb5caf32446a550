"""Graphs of a model, or of one module's own forward, of copies that share their parameters."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

from torch import fx, nn

from qframework.graph.module_shells import shell_tree

_BINARY_OPERATOR = dis.opmap["BINARY_OP"]
_INTERNAL = ("torch.", "qframework.")


@dataclass(frozen=True)
class Traced:
    """A graph and the modules that it calls.

    Attributes:
        graph: the trace.
        modules: for the name of a module in the graph, the module of the model.
        sites: for a node, where the code is that made it.
        read: parameters that code reads past the modules that are called.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    sites: dict[fx.Node, Site]
    read: frozenset[nn.Parameter]

    def called(self, node: Any) -> nn.Module | None:
        """The module that a node calls; None for other nodes."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.modules[str(node.target)]


@dataclass(frozen=True)
class Site:
    """Where a function is called.

    Attributes:
        file: of the source.
        line: in it.
        code: name of the Python function.
        instruction: offset within it, since a line may have several calls.
        operator: it is an operator, such as ``+=``, whose result is bound to a name.
    """

    file: str
    line: int
    code: str
    instruction: int
    operator: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file.replace(chr(92), '/').rpartition('/')[2]}:{self.line}"


def call_site() -> Site:
    """The place in code that is neither torch's nor ours from where the caller was reached."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not (name == "torch" or name.startswith(_INTERNAL)) or _is_generated(frame):
            break
        frame = frame.f_back
    assert frame is not None
    code = frame.f_code
    is_operator = code.co_code[frame.f_lasti] == _BINARY_OPERATOR
    return Site(code.co_filename, frame.f_lineno, code.co_qualname, frame.f_lasti, is_operator)


def _is_generated(frame: FrameType) -> bool:
    """Whether code was made by torch.fx out of a user's."""
    return frame.f_code.co_filename.startswith("<eval_with_key>")


class _Tracer(fx.Tracer):
    def __init__(
        self,
        own: bool,
        leaves: Callable[[nn.Module], bool] | None,
        plain: Mapping[type[nn.Module], Callable[..., Any]],
    ) -> None:
        super().__init__()
        self.own, self.leaves, self.sites = own, leaves, dict[fx.Node, Site]()
        self.plain = plain

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Children are leaves of a module's own forward; a model's leaves are torch's modules and those that are named."""
        if type(m) in self.plain and is_plain(m):
            return False
        named = self.own or (self.leaves is not None and self.leaves(m))
        return named or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through what a module computes, where that is told."""
        if type(m) in self.plain and is_plain(m):
            forward = partial(self.plain[type(m)], m)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note where it comes from."""
        node = super().create_node(*args, **kwargs)
        if node.op.startswith("call"):
            self.sites[node] = call_site()
        return node


def is_plain(module: nn.Module) -> bool:
    """Whether nothing was put in the place of a module's forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return "forward" not in vars(module) and not hooked


def trace(
    model: nn.Module,
    own: bool = False,
    prepare: Callable[[nn.Module], object] | None = None,
    leaves: Callable[[nn.Module], bool] | None = None,
    absent: Iterable[str] = (),
    plain: Mapping[type[nn.Module], Callable[..., Any]] | None = None,
) -> Traced | str:
    """The graph of a model, or why there is none; a forward leaves no traces on the model.

    Args:
        model: is traced down to torch's modules.
        own: down to its children instead.
        prepare: called with the copy that is traced.
        leaves: which modules aren't traced into, beside torch's.
        absent: names of arguments that are None.
        plain: functions to trace in place of the forward of modules of some types.
    """
    stands: dict[nn.Module, nn.Module] = {}
    shells = shell_tree(model, stands)
    original = {new: old for old, new in stands.items()}
    if prepare is not None:
        prepare(shells)
    tracer = _Tracer(own, leaves, plain or {})
    kind = type(shells)
    if kind in tracer.plain:
        shells.__class__ = type(kind.__name__, (kind,), {"forward": tracer.plain[kind]})
    try:
        graph = tracer.trace(shells, dict.fromkeys(absent) or None)
        names = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        modules = {n: original[shells.get_submodule(n)] for n in names}
        read = parameters_read(graph, shells)
    except Exception as error:  # whatever user code raises when it is traced
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Traced(graph, modules, tracer.sites, read)


def parameters_read(graph: fx.Graph, model: nn.Module) -> frozenset[nn.Parameter]:
    """The parameters of a model that its graph reads itself."""
    held = dict(model.named_parameters(remove_duplicate=False))
    names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    return frozenset(held[n] for n in names if n in held)
