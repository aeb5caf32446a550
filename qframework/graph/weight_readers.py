"""Which layers have parameters that other modules' code reads, past their own forward, by what the source says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

#: What is asked of a weight without computing with it.
_ASKED = frozenset(
    [
        "dtype",
        "device",
        "shape",
        "size",
        "ndim",
        "dim",
        "data",
        "grad",
        "requires_grad",
        "requires_grad_",
        "numel",
        "is_meta",
        "is_cuda",
        "element_size",
        "itemsize",
        "type",
        "register_hook",
        "dtype_",
        "get_device",
        "nelement",
        "is_contiguous",
        "stride",
    ]
)
#: Names of what layers compute with.
_PARAMETERS = frozenset(
    f"{start}{end}"
    for start in ("", "in_proj_", "q_proj_", "k_proj_", "v_proj_")
    for end in ("weight", "bias")
)


class _Use(NamedTuple):
    """A place in code that calls a module or reads a parameter of one.

    Attributes:
        read: the parameter's name; empty for a call.
        asked: something is asked of it that isn't its numbers.
        line: of the place.
        chain: the names behind ``self`` that lead to the module.
        file: of the place.
    """

    read: str
    asked: bool
    line: int
    chain: tuple[str, ...]
    file: str


@dataclass
class Readers:
    """What the source of all modules says.

    Attributes:
        read: for a layer, the first place where another module's code reads its weight: class, file name and line.
        called: modules that some code calls.
    """

    read: dict[nn.Module, str] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)


def has_own_code(module: nn.Module) -> bool:
    """Whether a module's class is neither one of torch's layers nor one of ours."""
    return not type(module).__module__.startswith(("torch.nn.", "qframework."))


def weight_readers(model: nn.Module) -> Readers:
    """Look through the methods that each module's forward reaches, for ``self.layer.weight`` and ``self.layer(...)``."""
    found = Readers()
    for module in model.modules():
        if isinstance(module, nn.Sequential) and not has_own_code(module):
            found.called.update(module)
    for reader, child, use in _uses_of(model):
        if not use.read:
            found.called.add(child)
        elif use.read == "weight" and not use.asked:
            if isinstance(child._parameters.get("weight"), nn.Parameter):
                found.read.setdefault(child, f"{type(reader).__name__}, {use.file}:{use.line}")
    return found


def readers_in_source(model: nn.Module) -> set[nn.Module]:
    """Modules of which another module's code names a parameter, be it for its dtype."""
    return {child for _, child, use in _uses_of(model) if use.read}


def _uses_of(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, _Use]]:
    """For each use in the code of a user's class, the module whose code it is and the other module that is used."""
    sources: dict[type, list[_Use]] = {}
    for module in model.modules():
        kind = type(module)
        if not has_own_code(module):
            continue
        if kind not in sources:
            sources[kind] = list(_uses(kind))
        for use in sources[kind]:
            child = _resolved(module, use.chain)
            if isinstance(child, nn.Module) and child is not module:
                yield module, child, use


def _resolved(module: Any, chain: tuple[str, ...]) -> Any:
    for name in chain:
        module = getattr(module, "_modules", {}).get(name) or getattr(module, name, None)
    return module


def _uses(kind: type) -> Iterator[_Use]:
    """The uses in all that a forward reaches."""
    waiting, done = ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        function: Any = getattr(kind, name, None)
        function = inspect.unwrap(function) if callable(function) else None
        # what was generated, as forwards of torch.fx are, is of no module
        if not inspect.isfunction(function) or (function.__module__ or "").startswith("torch.nn."):
            continue
        try:
            lines, start = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError, TypeError):
            continue
        file = (inspect.getsourcefile(function) or "").replace("\\", "/").rpartition("/")[2]
        own = next(iter(inspect.signature(function).parameters), "self")
        asked = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _ASKED
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                chain = _chain(node.func, own)
                if chain and len(chain) == 1:
                    waiting.append(chain[0])
                if chain:
                    yield _Use("", False, start + node.lineno - 1, chain, file)
            elif isinstance(node, ast.Attribute) and node.attr in _PARAMETERS:
                chain = _chain(node.value, own)
                if chain and isinstance(node.ctx, ast.Load):
                    line = start + node.lineno - 1
                    yield _Use(node.attr, node in asked, line, chain, file)


def _chain(node: ast.AST, own: str) -> tuple[str, ...]:
    """``("a", "b")`` for ``self.a.b``, where ``own`` is ``"self"``; nothing for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == own else ()
