"""Which layers have their weight read by other modules' code, past their own forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Readers:
    """What the source of all modules says.

    Attributes:
        read: for a layer, the first place where another module's code reads its weight: class, file name and line.
        called: modules that some code calls.
    """

    read: dict[nn.Module, str] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)


def weight_readers(model: nn.Module) -> Readers:
    """Look through the methods that each module's forward reaches, for ``self.layer.weight`` and ``self.layer(...)``."""
    found = Readers()
    sources: dict[type, list[tuple[str, int, tuple[str, ...], str]]] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.nn.", "qframework.")):
            if isinstance(module, nn.Sequential):
                found.called.update(module)
            continue
        if kind not in sources:
            sources[kind] = list(_uses(kind))
        for use, line, chain, file in sources[kind]:
            child = _resolved(module, chain)
            if not isinstance(child, nn.Module) or child is module:
                continue
            if use == "call":
                found.called.add(child)
            elif isinstance(child._parameters.get("weight"), nn.Parameter):
                found.read.setdefault(child, f"{kind.__name__}, {file}:{line}")
    return found


def _resolved(module: Any, chain: tuple[str, ...]) -> Any:
    for name in chain:
        module = getattr(module, "_modules", {}).get(name) or getattr(module, name, None)
    return module


def _uses(kind: type) -> Iterator[tuple[str, int, tuple[str, ...], str]]:
    """``("read" or "call", line, names behind self, file)`` in all that a forward reaches."""
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
                    yield "call", start + node.lineno - 1, chain, file
            elif isinstance(node, ast.Attribute) and node.attr == "weight" and node not in asked:
                chain = _chain(node.value, own)
                if chain and isinstance(node.ctx, ast.Load):
                    yield "read", start + node.lineno - 1, chain, file


def _chain(node: ast.AST, own: str) -> tuple[str, ...]:
    """``("a", "b")`` for ``self.a.b``, where ``own`` is ``"self"``; nothing for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == own else ()
