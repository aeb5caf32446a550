"""The projections of multi-head attention, each as a linear layer: torch's attention reads its weights itself and calls none.

A projection shares the storage of the weight's rows that it stands for, so that what is written into it in place, attention reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qframework.graph.layer_inputs import Seen, watching
from qframework.graph.module_shells import shell
from qframework.graph.tracing import Traced
from qframework.layers import QuantMultiheadAttention

#: Names of the arguments that are projected, in order.
OPERANDS = ("query", "key", "value")


class Projection(nn.Linear):
    """Some rows of a weight that attention projects with, as a linear layer that is never called.

    Args:
        attention: whose projection it is.
        holder: the module that holds the parameters.
        weight: name of the weight in it.
        bias: name of the bias in it.
        operands: indices into :data:`OPERANDS` of what it reads; none for the projection of the result.
        rows: of the weight, from and to; None for all.

    Attributes:
        attention, holder, names, operands, rows: as given.
    """

    attention: Any
    holder: Any
    names: tuple[str, str]
    operands: tuple[int, ...]

    def __init__(
        self,
        attention: Any,
        holder: Any,
        weight: str,
        bias: str,
        operands: tuple[int, ...],
        rows: tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.operands, self.rows, self.names = operands, rows, (weight, bias)
        self.bias_rows = rows
        self.__dict__["attention"], self.__dict__["holder"] = attention, holder  # no parts of it
        if rows is None and bias == "in_proj_bias" and weight != "in_proj_weight":
            size = attention.embed_dim
            self.bias_rows = (operands[0] * size, (operands[0] + 1) * size)
        self.refresh()
        self.out_features, self.in_features = self.weight.shape

    def refresh(self) -> None:
        """Share the storage of the parameters that attention holds now."""
        for own, name, rows in zip(
            ("weight", "bias"), self.names, (self.rows, self.bias_rows), strict=True
        ):
            held = self.holder._parameters.get(name)
            if held is not None and rows is not None:
                held = nn.Parameter(held.data[slice(*rows)], requires_grad=False)
            self.register_parameter(own, held)

    def make_own(self, bias: bool) -> None:
        """Let attention have parameters that no other module holds.

        Args:
            bias: make one of zeros where there is none.
        """
        attention, (weight, name) = self.attention, self.names
        old: Any = self.holder._parameters[weight]
        self.holder._parameters[weight] = _copy_of(old, old)
        held = self.holder._parameters.get(name)
        if held is not None:
            self.holder._parameters[name] = _copy_of(held, held)
        elif bias:
            rows = 3 * attention.embed_dim if name == "in_proj_bias" else old.shape[0]
            self.holder._parameters[name] = _copy_of(old.new_zeros(rows), old)
            last = attention.out_proj
            if last.bias is None:  # torch's fused attention takes both or none
                last.bias = _copy_of(old.new_zeros(attention.embed_dim), old)
        self.refresh()

    def parametrize(self, computed: nn.Module) -> None:
        """Let the weight be computed from the one that attention holds now.

        Args:
            computed: from the rows of this projection to those that are used.
        """
        if self.rows is not None:
            computed = _OfRows(computed, *self.rows)
        parametrize.register_parametrization(self.holder, self.names[0], computed)


class _OfRows(nn.Module):
    """A parametrization of some rows of a weight.

    Args:
        inner: of these rows.
        start: the first one.
        stop: the one behind the last one.
    """

    def __init__(self, inner: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.inner, self.start, self.stop = inner, start, stop

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with these rows computed."""
        middle = self.inner(weight[self.start : self.stop])
        return torch.cat([weight[: self.start], middle, weight[self.stop :]])


def _copy_of(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=like.requires_grad)


# ------------------------------------------------------------ the projections of one attention


class Projections:
    """What an attention layer projects with.

    Args:
        attention: of torch, or a quantized one.
        name: its name.
        same: whether query, key and value are one tensor in all of its calls.

    Attributes:
        inputs: names and layers, each with the indices of the operands that it reads.
        value: name and layer that makes the values.
        result: name and layer that projects the result.
    """

    def __init__(self, attention: Any, name: str, same: bool) -> None:
        quantized = isinstance(attention, QuantMultiheadAttention)
        size = attention.embed_dim
        self.attention = attention
        self.inputs: list[tuple[str, nn.Module, tuple[int, ...]]] = []

        def named(part: str) -> str:
            return f"{name}.{part}" if name else part

        def rows(i: int) -> Projection:
            held: Any = attention.in_proj if quantized else attention
            names = ("weight", "bias") if quantized else ("in_proj_weight", "in_proj_bias")
            return Projection(attention, held, *names, (i,), (i * size, (i + 1) * size))

        parts = ("q_proj", "k_proj", "v_proj")
        if quantized and attention.packed_in_proj:
            self.inputs.append((named("in_proj"), attention.in_proj, (0, 1, 2)))
            value: nn.Module = rows(2)
        elif quantized:
            self.inputs += [
                (named(p), attention.get_submodule(p), (i,)) for i, p in enumerate(parts)
            ]
            value = attention.v_proj
        elif not attention._qkv_same_embed_dim:
            made = [
                Projection(attention, attention, f"{p}_weight", "in_proj_bias", (i,))
                for i, p in enumerate(parts)
            ]
            self.inputs += [(named(p), made[i], (i,)) for i, p in enumerate(parts)]
            value = made[2]
        elif same:
            every = (0, 1, 2)
            whole = Projection(attention, attention, "in_proj_weight", "in_proj_bias", every)
            self.inputs.append((named("in_proj"), whole, every))
            value = rows(2)
        else:
            made = [rows(i) for i in range(3)]
            self.inputs += [(named(p), made[i], (i,)) for i, p in enumerate(parts)]
            value = made[2]
        result: Any = attention.out_proj
        if not quantized:
            result = Projection(attention, result, "weight", "bias", ())
        self.value = (named("v_proj"), value)
        self.result = (named("out_proj"), result)

    def read_by(self, node: fx.Node) -> Iterator[tuple[str, nn.Module, fx.Node | None]]:
        """For each projection and operand of a call the node that it reads."""
        given = operands_of(node)
        for name, layer, operands in self.inputs:
            for i in operands:
                yield name, layer, given[i]


def operands_of(node: fx.Node) -> list[fx.Node | None]:
    """Query, key and value of a call."""
    found = []
    for i, name in enumerate(OPERANDS):
        value = node.args[i] if len(node.args) > i else node.kwargs.get(name)
        found.append(value if isinstance(value, fx.Node) else None)
    return found


def why_one_whole(module: nn.Module) -> str | None:
    """Why the projections of an attention layer can't be got at; None where they can."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    if isinstance(module, QuantMultiheadAttention):
        parts = ("in_proj",) if module.packed_in_proj else ("q_proj", "k_proj", "v_proj")
        plain = all(isinstance(getattr(module, p), nn.Linear) for p in (*parts, "out_proj"))
        return None if plain else "its projections were replaced"
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
        return f"a {type(module).__name__} has a forward of its own"
    held = module._parameters
    packed = bool(module._qkv_same_embed_dim)
    names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    result: Any = module.out_proj
    if any(held.get(n) is None for n in names) or result._parameters.get("weight") is None:
        return "its weight is computed at each call"
    if result._forward_hooks or result._forward_pre_hooks:
        return "its out_proj has hooks"
    return None


def projections_of(traced: Traced) -> dict[nn.Module, Projections]:
    """The projections of all attention layers of a graph that can be got at."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        module = traced.called(node)
        if isinstance(module, nn.MultiheadAttention) and why_one_whole(module) is None:
            calls.setdefault(module, []).append(node)
    found = {}
    for module, nodes in calls.items():
        same = all(len(set(operands_of(n))) == 1 for n in nodes)
        found[module] = Projections(module, str(nodes[0].target), same)
    return found


def with_projections(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of layers, where one is of an attention layer also those of its projections."""
    found = set(names)
    for name, module in model.named_modules():
        if name in found and isinstance(module, nn.MultiheadAttention):
            parts = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
            found |= {f"{name}.{p}" if name else p for p in parts}
    return found


# ------------------------------------------------------------ what projections are given


@contextmanager
def watching_projections(layers: list[nn.Module], seen: Seen) -> Iterator[None]:
    """As :func:`~qframework.graph.layer_inputs.watching`, with projections among the layers."""
    plain = [m for m in layers if not isinstance(m, Projection)]
    of_attention: dict[nn.Module, list[Projection]] = {}
    for layer in layers:
        if isinstance(layer, Projection):
            of_attention.setdefault(layer.attention, []).append(layer)

    def hook(attention: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *(kwargs.get(n) for n in OPERANDS[len(args) :])]
        for layer in of_attention[attention]:
            if not layer.operands:
                seen(layer, attended_values(attention, args, kwargs))
            for i in {id(given[i]): i for i in layer.operands}.values():
                seen(layer, given[i])

    with ExitStack() as stack:
        stack.enter_context(watching(plain, seen))
        for attention in of_attention:
            handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def attended_values(attention: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """What an attention layer of torch projects its result from.

    Args:
        attention: the layer.
        args: of a call.
        kwargs: of that call.
    """
    twin: Any = shell(attention)
    twin._forward_pre_hooks.clear()
    twin._forward_hooks.clear()
    last = shell(twin.out_proj)
    weight: Any = last.weight
    last._parameters["weight"] = nn.Parameter(
        torch.eye(len(weight), device=weight.device, dtype=weight.dtype), requires_grad=False
    )
    bias = last._parameters.get("bias")
    if bias is not None:
        last._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    twin._modules["out_proj"] = last
    return twin(*args, **{**kwargs, "need_weights": False})[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------ a module in front


class AttentionInputChanged(nn.Module):
    """Attention behind a module that changes some of query, key and value.

    Args:
        change: that module.
        layer: the attention layer.
        operands: indices into :data:`OPERANDS`.
    """

    def __init__(self, change: nn.Module, layer: nn.Module, operands: tuple[int, ...]) -> None:
        super().__init__()
        self.change, self.layer, self.operands = change, layer, operands

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Attention of the changed operands; one that stands for several stays one."""
        given = [query, key, value]
        made: dict[int, Any] = {}
        for i in self.operands:
            if id(given[i]) not in made:
                made[id(given[i])] = self.change(given[i])
        used = [made[id(x)] if i in self.operands else x for i, x in enumerate(given)]
        return self.layer(*used, *args, **kwargs)

    @property
    def batch_first(self) -> bool:
        """That of the attention layer, which torch's encoder asks for."""
        return bool(self.layer.batch_first)

    @property
    def num_heads(self) -> int:
        """That of the attention layer."""
        return int(self.layer.num_heads)  # type: ignore[arg-type]

    @property
    def embed_dim(self) -> int:
        """That of the attention layer."""
        return int(self.layer.embed_dim)  # type: ignore[arg-type]

    @property
    def in_proj_bias(self) -> Any:
        """That of the attention layer."""
        return self.layer.in_proj_bias

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return bool(self.layer._qkv_same_embed_dim)
