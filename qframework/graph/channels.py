"""Which channels of a model's layers are one and the same, so that a factor on one side can be undone on the other.

Each channel of each tensor has a number. Operations that keep channels apart and commute with positive factors hand the numbers
on; an addition makes those of both operands one; a concatenation puts them side by side. What a layer writes is a source of its
channels, what a layer reads a sink. Channels that anything else reads or writes can't be scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from qframework.graph.attention_projections import Projections, operands_of, projections_of
from qframework.graph.bounded_activations import RELU6_FUNCTIONS, RELU6_TOP, is_relu6
from qframework.graph.channel_grouping import group
from qframework.graph.channel_numbers import ChannelNumbers
from qframework.graph.channel_operations import (
    ADDITIONS,
    AVERAGES,
    CONCATENATIONS,
    FLATTEN,
    INVARIANT,
    INVARIANT_FUNCTIONS,
    NORMS,
    PASSING,
    PASSING_FUNCTIONS,
    RESHAPE,
    SHAPES,
    SPATIAL,
    SPATIAL_FUNCTIONS,
)
from qframework.graph.channel_regions import (
    FACTORS,
    FLAT,
    LAST,
    MEAN,
    ROTATION,
    SECOND,
    Held,
    Region,
)
from qframework.graph.layer_view import CONVOLUTIONS, LINEAR, TRANSPOSED
from qframework.graph.parameters_in_use import readers_in_code, why_fixed
from qframework.graph.tracing import Traced


class Channels:
    """The channels of a traced model.

    Args:
        traced: the model's graph.
        moves: what is moved across, :data:`FACTORS`, :data:`ROTATION` or :data:`MEAN`.
        restarts: modules behind which other channels begin, that a factor behind them may scale: they count as sources.
        largest: for calls of ReLU6 the largest input of each channel on a sample, see
            :func:`~qframework.graph.bounded_activations.largest_inputs`; without it, ReLU6 can't be passed.
        attention: take the projections of attention layers as layers; else channels end there.
    """

    def __init__(
        self,
        traced: Traced,
        moves: str = FACTORS,
        restarts: tuple[type[nn.Module], ...] = (),
        largest: Mapping[fx.Node, tuple[Tensor, Tensor]] | None = None,
        attention: bool = True,
    ) -> None:
        self.restarts, self.largest = restarts, largest or {}
        self.traced, self.moves = traced, moves
        self.numbers = ChannelNumbers()
        self.held: dict[fx.Node, Held | None] = {}
        self._sources: dict[nn.Module, tuple[str, list[int], list[fx.Node]]] = {}
        self._sinks: dict[nn.Module, tuple[str, list[int], list[fx.Node]]] = {}
        self._attention = projections_of(traced) if attention else {}
        self._in_code = readers_in_code(traced)
        for node in traced.graph.nodes:
            self.held[node] = self._visit(node)

    # ------------------------------------------------------------ nodes

    def _visit(self, node: fx.Node) -> Held | None:
        module = self.traced.called(node)
        if module is not None:
            return self._call(node, module)
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            for given in node.all_input_nodes:
                self._block(self.held[given], "the model returns it")
            return None
        return self._function(node)

    def _given(self, node: fx.Node, index: int = 0) -> Held | None:
        arg = node.args[index] if len(node.args) > index else None
        return self.held.get(arg) if isinstance(arg, fx.Node) else None

    def _block(self, held: Held | None, reason: str) -> None:
        if held is not None:
            self.numbers.block(held.ids, reason)

    def _block_all(self, node: fx.Node, reason: str) -> None:
        for given in node.all_input_nodes:
            self._block(self.held[given], reason)

    def _call(self, node: fx.Node, module: nn.Module) -> Held | None:
        held = self._given(node)
        if module._forward_hooks or module._forward_pre_hooks:
            self._block_all(node, f"{node.target} has hooks")
            return None
        fixed = why_fixed(module, self._in_code)
        if fixed is not None:
            self._block_all(node, f"{node.target} is as it is: {fixed}")
            return None
        if isinstance(module, (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)):
            return self._layer(node, module, held)
        if isinstance(module, PASSING):
            return held
        if module in self._attention:
            return self._attend(node, self._attention[module])
        if self.moves == FACTORS:
            if isinstance(module, INVARIANT):
                return held
            if isinstance(module, SPATIAL) and held is not None and held.axis == SECOND:
                return held
            if is_relu6(module) and not isinstance(module, self.restarts):
                return self._bounded(node, held)
            if isinstance(module, (*NORMS, nn.LayerNorm, nn.RMSNorm)):
                return self._norm(node, module)
        elif isinstance(module, nn.Embedding):
            return Held(self._write(node, module, module.embedding_dim), LAST)
        elif self._lets_pass(module, held):
            return held
        elif (
            self.moves == MEAN and isinstance(module, nn.LayerNorm) and self._is_wide(module, held)
        ):
            assert held is not None
            self._read(node, module, held.ids)
            return None
        self._block_all(
            node, f"{node.target} ({type(module).__name__}) doesn't scale with its input"
        )
        if isinstance(module, self.restarts) and held is not None:
            if module in self._sources:  # what it scales in one place it scales in all
                self._block(Held(self._sources[module][1], LAST), f"{node.target} is called twice")
                return None
            return Held(self._write(node, module, len(held.ids)), held.axis)
        return None

    def _layer(self, node: fx.Node, module: Any, held: Held | None) -> Held:
        linear = isinstance(module, LINEAR)
        inputs = module.in_features if linear else module.in_channels
        outputs = module.out_features if linear else module.out_channels
        fits = self._as_input(held, linear, inputs)
        extra = [n for n in node.all_input_nodes if n is not node.args[0]] if node.args else []
        for n in extra:
            self._block(self.held[n], f"{node.target} reads it otherwise")
        if held is not None and fits is None:
            self._block(held, f"{node.target} reads it along another axis")
        ids = fits if fits is not None else self.numbers.new(inputs)
        if fits is None:
            self._block(Held(ids, LAST), f"what {node.target} reads comes from no layer")
        self._read(node, module, ids)
        return Held(self._write(node, module, outputs), LAST if linear else SECOND)

    def _attend(self, node: fx.Node, parts: Projections) -> Held:
        """Attention: what is projected is read, the result written; between them values keep their channels."""
        given = operands_of(node)
        for other in node.all_input_nodes:
            if other not in given:
                self._block(self.held[other], f"{node.target} reads it otherwise")
        for name, layer, operand in parts.read_by(node):
            held = None if operand is None else self.held.get(operand)
            self._read(node, layer, self._projected(name, layer, held), name)
        if self.moves == FACTORS:
            (name, value), (last, result) = parts.value, parts.result
            first = value not in self._sources
            ids = self._write(node, value, parts.attention.embed_dim, name)
            if first:
                self._read(node, result, ids, last)
            if parts.attention.bias_v is not None:
                self._block(Held(ids, LAST), f"{node.target} adds bias_v to the values")
        name, result = parts.result
        return Held(self._write(node, result, parts.attention.embed_dim, name), LAST)

    def _projected(self, name: str, layer: Any, held: Held | None) -> list[int]:
        """The channels that a projection reads."""
        fits = self._as_input(held, True, layer.in_features)
        if fits is not None and held is not None and held.axis == LAST:
            return fits
        self._block(held, f"{name} reads it along another axis")
        ids = self.numbers.new(layer.in_features)
        self._block(Held(ids, LAST), f"what {name} reads comes from no layer")
        return ids

    def _lets_pass(self, module: Any, held: Held | None) -> bool:
        """Whether a norm commutes with rotations."""
        if self.moves != ROTATION or not isinstance(module, nn.RMSNorm):
            return False
        weight = module._parameters.get("weight")
        return self._is_wide(module, held) and (weight is None or bool((weight == 1).all()))

    @staticmethod
    def _is_wide(norm: Any, held: Held | None) -> bool:
        """Whether a norm is over the channels and nothing else."""
        return (
            held is not None
            and held.axis == LAST
            and tuple(norm.normalized_shape) == (len(held.ids),)
        )

    def _read(
        self, node: fx.Node, module: nn.Module, ids: list[int], name: str | None = None
    ) -> None:
        if module not in self._sinks:
            self._sinks[module] = (name or str(node.target), ids, [node])
        else:
            self.numbers.join(self._sinks[module][1], ids)
            self._sinks[module][2].append(node)

    def _write(
        self, node: fx.Node, module: nn.Module, count: int, name: str | None = None
    ) -> list[int]:
        if module not in self._sources:
            self._sources[module] = (name or str(node.target), self.numbers.new(count), [node])
        else:
            self._sources[module][2].append(node)
        return self._sources[module][1]

    def _as_input(self, held: Held | None, linear: bool, count: int) -> list[int] | None:
        if held is None or not held.ids:
            return None
        if held.axis == FLAT and linear and count == len(held.ids):
            return (
                held.ids
            )  # one position; with several, a channel's columns have ranges of their own
        right = held.axis == (LAST if linear else SECOND)
        return held.ids if right and len(held.ids) == count else None

    def _norm(self, node: fx.Node, module: Any) -> Held | None:
        self._block_all(node, f"{node.target} normalizes it")
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1:
            return None
        given = self._given(node)
        axis = SECOND if isinstance(module, NORMS) else LAST
        if isinstance(module, nn.BatchNorm1d) and given is not None:
            axis = given.axis if given.axis != FLAT else LAST
        return Held(self._write(node, module, weight.numel()), axis)

    def _function(self, node: fx.Node) -> Held | None:
        target: Any = node.target
        if target in SHAPES and (
            target is not getattr or node.args[1] in ("shape", "ndim", "device", "dtype")
        ):
            return None
        if target is operator.getitem and self.traced.called(node.args[0]) in self._attention:
            return self._given(node) if node.args[1] == 0 else None  # the result, or the weights
        if target is operator.getitem and not any(self.held.get(n) for n in node.all_input_nodes):
            return None
        if target in ADDITIONS:
            return self._sum(node)
        if target in PASSING_FUNCTIONS:
            return self._given(node)
        if self.moves != FACTORS:
            self._block_all(node, f"{node.name} doesn't pass it on")
            return None
        if target in INVARIANT_FUNCTIONS:
            return self._given(node)
        if target in RELU6_FUNCTIONS:
            return self._bounded(node, self._given(node))
        if target in SPATIAL_FUNCTIONS:
            held = self._given(node)
            if held is None or held.axis == SECOND:
                return held
        if target in CONCATENATIONS:
            return self._concatenation(node)
        if target in FLATTEN:
            rest = [*node.args[1:], *node.kwargs.values()]
            start = rest[0] if rest else 0
            return self._flattened(node, self._given(node), start, rest[1] if len(rest) > 1 else -1)
        if target in RESHAPE and len(node.args) == 3 and node.args[2] == -1:
            return self._flattened(node, self._given(node), 1, -1)
        held = self._given(node)
        if target in AVERAGES and held is not None and held.axis == SECOND:
            axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim"))
            several = list(axes) if isinstance(axes, (tuple, list)) else [axes]
            if set(several) in ({2, 3}, {-1, -2}):
                return Held(held.ids, SECOND if keep else LAST)
        self._block_all(node, f"{node.name} doesn't scale with its input")
        return None

    def _bounded(self, node: fx.Node, held: Held | None) -> Held | None:
        """A ReLU6, which scales with its input where that stays below 6."""
        if held is None:
            return None
        if node not in self.largest:
            self._block(
                held, f"{node.name} is bounded by 6, and no sample tells whether that is reached"
            )
            return held
        second, last = self.largest[node]
        tops = second if held.axis == SECOND else last
        for i, top in zip(held.ids, tops.tolist(), strict=True):
            if top >= RELU6_TOP:
                self.numbers.block([i], f"{node.name} reaches its bound of 6")
            else:
                self.numbers.bound(i, RELU6_TOP / max(top, 1e-12))
        return held

    def _sum(self, node: fx.Node) -> Held | None:
        operands = [self.held.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2]]
        a, b = operands if len(operands) == 2 else (None, None)
        plain = len(node.args) == 2 and not node.kwargs
        if not plain or a is None or b is None or a.axis != b.axis or len(a.ids) != len(b.ids):
            self._block_all(node, f"{node.name} adds something else to it")
            return None
        self.numbers.join(a.ids, b.ids)
        return a

    def _concatenation(self, node: fx.Node) -> Held | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        held = [self.held.get(p) if isinstance(p, fx.Node) else None for p in parts]  # type: ignore[union-attr]
        first = held[0]
        if first is None or any(h is None or h.axis != first.axis for h in held):
            ok = False
        else:
            # Along axis 1 of tensors of three axes other elements are joined: then what reads them has another width.
            ok = bool(axis == 1 or (first.axis != SECOND and axis == -1))
        if not ok or first is None:
            self._block_all(node, f"{node.name} joins it with something else")
            return None
        return Held([i for h in held if h is not None for i in h.ids], first.axis)

    def _flattened(self, node: fx.Node, held: Held | None, start: Any, end: Any) -> Held | None:
        if held is None:
            return None
        if held.axis == SECOND and start == 1 and end == -1:
            return Held(held.ids, FLAT)
        if held.axis in (LAST, FLAT) and start == 1 and end == -1:
            # of more than two axes, what reads it has another width
            return held
        self._block(held, f"{node.name} mixes its axes")
        return None

    def regions(self) -> list[Region]:
        """Groups of sources and sinks that share channels, in the order of their first sources."""
        return group(self.numbers, self._sources, self._sinks, self.held)
