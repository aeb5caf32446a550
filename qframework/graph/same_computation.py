"""Whether a class that is derived from one of torch's layers computes what that layer does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from qframework.graph.tracing import Traced, trace

#: What a class may define anew without computing otherwise.
_HARMLESS = frozenset(
    [
        "__init__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__constants__",
        "__repr__",
        "__orig_bases__",
        "__parameters__",
        "__firstlineno__",
        "__static_attributes__",
        "__abstractmethods__",
        "_abc_impl",
        "__slots__",
        "__annotate_func__",
        "__annotations_cache__",
        "extra_repr",
        "reset_parameters",
        "_get_name",
        "_version",
        "_load_from_state_dict",
        "_save_to_state_dict",
        "__dict__",
        "__weakref__",
        "__type_params__",
        "__init_subclass__",
        "__class_getitem__",
        "__hash__",
    ]
)
_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
}  # fmt: skip
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ABSENT = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class SameComputation:
    """What a module computes: the function of ``base``, with a weight that may be computed.

    Attributes:
        base: torch's class.
        weight: function of the module's parameters that gives the weight; None where it is a parameter.
        reads: names of those parameters.
    """

    base: type[nn.Module]
    weight: fx.GraphModule | None = None
    reads: tuple[str, ...] = ()


def same_computation(
    module: nn.Module, bases: Collection[type[nn.Module]]
) -> SameComputation | str | None:
    """What is the same about a module and the torch layer that it derives from; or why nothing is.

    A subclass is the same where it overrides nothing that its base computes with. With a forward of its own it is where
    that, when traced, is the base's function with the module's settings, of a weight that depends on parameters alone.

    Args:
        module: of one of the types, or derived from one.
        bases: torch's layers.

    Returns:
        None for what isn't derived from any of them.
    """
    kind = type(module)
    base = next((t for t in kind.__mro__ if t in bases), None)
    if base is None:
        return None
    if kind is base and "forward" not in vars(module):
        return SameComputation(base)
    changed = _changed(module, base)
    if not changed:
        added = _added(module, base)
        if added:
            return f"a {kind.__name__} has parameters that its base {base.__name__} hasn't: {', '.join(added)}"
        return SameComputation(base)
    what = f"a {kind.__name__} overrides {', '.join(changed)} of its base {base.__name__}"
    if changed != ["forward"] or base not in _FUNCTIONS:
        return what
    found = _by_trace(module, base)
    return f"{what}, {found}" if isinstance(found, str) else found


def _changed(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """Names of the base that a class, or the module itself, defines anew."""
    found = []
    held = {*vars(module), *module._parameters, *module._buffers}
    for kind in type(module).__mro__:
        if kind in base.__mro__:
            continue
        for name, value in vars(kind).items():
            if name in _HARMLESS:
                continue
            hides = name in held and hasattr(type(value), "__set__")
            if hides or hasattr(base, name) or name in ("__call__", "__getattr__"):
                found.append(name)
    if "forward" in vars(module):
        found.append("forward")
    return list(dict.fromkeys(found))


def _added(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """Parameters and modules that a layer of the base class doesn't have."""
    own = [*module._parameters, *module._buffers, *module._modules]
    if issubclass(base, (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return []
    return [n for n in own if n not in ("weight", "bias")]


def _by_trace(module: nn.Module, base: type[nn.Module]) -> SameComputation | str:
    """What the traced forward of a module says."""
    first = trace(module, own=True, prepare=lambda m: m.eval())
    second = trace(module, own=True, prepare=lambda m: m.train())
    if isinstance(first, str) or isinstance(second, str):
        return f"which can't be traced ({first if isinstance(first, str) else second})"
    if str(first.graph) != str(second.graph):
        return "and computes otherwise in training"
    return _matched(first, module, base)


def _matched(traced: Traced, module: Any, base: type[nn.Module]) -> SameComputation | str:
    nodes = list(traced.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    result: Any = nodes[-1].args[0]
    otherwise = "and computes otherwise"
    if len(inputs) != 1 or not isinstance(result, fx.Node) or result.target is not _FUNCTIONS[base]:
        return otherwise
    given: dict[str, Any] = dict(zip(_CONVOLUTION, result.args, strict=False))
    given |= result.kwargs
    if given["input"] is not inputs[0] or len(inputs[0].users) != 1:
        return otherwise
    bias, weight = given.get("bias"), given["weight"]
    if not (bias is None if module.bias is None else _reads(bias, "bias")):
        return otherwise
    if base is not nn.Linear:
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return otherwise
        for name in _CONVOLUTION[3:]:
            if not _alike(given.get(name, _ABSENT[name]), getattr(module, name)):
                return f"and computes with another {name}"
    if _reads(weight, "weight"):
        added = _added(module, base)
        return "and has parameters of its own" if added else SameComputation(base)
    return _computed(traced, weight, module, base)


def _reads(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name


def _alike(a: Any, b: Any) -> bool:
    """Whether two settings are the same for all axes."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return tuple(a) == tuple(b)
    if isinstance(a, (tuple, list)):
        a, b = b, a
    return all(a == x for x in b) if isinstance(b, (tuple, list)) else a == b


def _computed(
    traced: Traced, weight: Any, module: nn.Module, base: type[nn.Module]
) -> SameComputation | str:
    """The weight as a function of parameters."""
    needed: set[fx.Node] = set()
    waiting = [weight]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    graph, copies, reads = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    ordered = [n for n in traced.graph.nodes if n in needed]
    if any(n.op in ("placeholder", "call_module") for n in ordered):
        return "and its weight depends on the input"
    for node in ordered:
        if node.op == "get_attr":
            name = str(node.target)
            if "." in name or name not in {*module._parameters, *module._buffers}:
                return "and its weight is computed from other modules"
            if name not in reads:
                reads[name] = graph.placeholder(name)
            copies[node] = reads[name]
    for node in ordered:
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[weight])
    left = [n for n in _added(module, base) if n not in reads]
    if "weight" not in reads or left:
        return "and has parameters of its own"
    return SameComputation(base, fx.GraphModule(nn.Module(), graph), tuple(reads))
