"""Which channels of a model's layers are one and the same, so that a factor on one side can be undone on the other.

Each channel of each tensor has a number. Operations that keep channels apart and commute with positive factors hand the numbers
on; an addition makes those of both operands one; a concatenation puts them side by side. What a layer writes is a source of its
channels, what a layer reads a sink. Channels that anything else reads or writes can't be scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qframework.graph.bounded_activations import RELU6_FUNCTIONS, RELU6_TOP, is_relu6
from qframework.graph.layer_view import CONVOLUTIONS, LINEAR, TRANSPOSED
from qframework.graph.tracing import Traced

#: Modules that scale with their input, element by element.
INVARIANT: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
#: Modules that do along axes behind that of the channels.
SPATIAL: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.Upsample, nn.UpsamplingNearest2d,
)  # fmt: skip
#: Functions and methods that do, element by element.
INVARIANT_FUNCTIONS: frozenset[Any] = frozenset({
    torch.relu, F.relu, F.relu_, F.leaky_relu, F.dropout, "relu", "relu_", "contiguous", "clone",
    "detach",
})  # fmt: skip
#: Functions that do along axes behind that of the channels.
SPATIAL_FUNCTIONS: frozenset[Any] = frozenset({
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.adaptive_max_pool2d, F.interpolate,
})  # fmt: skip
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
CONCATENATIONS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
_FLATTEN: frozenset[Any] = frozenset({torch.flatten, "flatten"})
_RESHAPE: frozenset[Any] = frozenset({torch.reshape, "reshape", "view"})
_MEAN: frozenset[Any] = frozenset({torch.mean, "mean"})
#: What reads a tensor's shape, not its numbers.
_SHAPES: frozenset[Any] = frozenset({getattr, "size", "dim"})
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Modules that let any linear map of their input's channels pass, in evaluation mode.
PASSING: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
PASSING_FUNCTIONS: frozenset[Any] = frozenset({F.dropout, "contiguous", "clone", "detach"})

#: What is moved across: factors of channels; a rotation, which norms by the root mean square let pass; a shift of the mean,
#: which ends at layer norms.
FACTORS, ROTATION, MEAN = "factors", "rotation", "mean"

#: The axis of channels: the second one, with spatial axes behind it; the last one; or the last one, made of channels and
#: positions by flattening.
SECOND, LAST, FLAT = "second", "last", "flat"


@dataclass
class Held:
    """The channels of one tensor.

    Attributes:
        ids: their numbers.
        axis: where they are.
    """

    ids: list[int]
    axis: str


@dataclass
class Use:
    """One layer's side of a region.

    Attributes:
        name: of the layer.
        layer: itself.
        ids: for each of its channels on this side the number of the region's channel.
        calls: nodes that call it.
    """

    name: str
    layer: nn.Module
    ids: Tensor
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass
class Region:
    """Channels that a factor for each can be moved across.

    Attributes:
        sources: layers whose output channels they are.
        sinks: layers whose input channels they are.
        size: number of channels.
        free: for each channel, whether nothing else reads or writes it.
        most: for each channel the largest factor that what bounds it allows.
        reasons: why some aren't.
        tensors: nodes whose results hold the channels.
    """

    sources: list[Use]
    sinks: list[Use]
    size: int
    free: Tensor
    reasons: list[str]
    tensors: list[fx.Node] = field(default_factory=list)
    most: Tensor | None = None

    @property
    def is_free(self) -> bool:
        """Whether all channels can be scaled."""
        return bool(self.free.all())


class Channels:
    """The channels of a traced model.

    Args:
        traced: the model's graph.
        moves: what is moved across, :data:`FACTORS`, :data:`ROTATION` or :data:`MEAN`.
        restarts: modules behind which other channels begin, that a factor behind them may scale: they count as sources.
        largest: for calls of ReLU6 the largest input of each channel on a sample, see
            :func:`~qframework.graph.bounded_activations.largest_inputs`; without it, ReLU6 can't be passed.
    """

    def __init__(
        self,
        traced: Traced,
        moves: str = FACTORS,
        restarts: tuple[type[nn.Module], ...] = (),
        largest: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:
        self.restarts, self.largest = restarts, largest or {}
        self._most: dict[int, float] = {}
        self.traced, self.moves = traced, moves
        self._parent: list[int] = []
        self._blocked: dict[int, str] = {}
        self.held: dict[fx.Node, Held | None] = {}
        self._sources: dict[nn.Module, tuple[str, list[int], list[fx.Node]]] = {}
        self._sinks: dict[nn.Module, tuple[str, list[int], list[fx.Node]]] = {}
        for node in traced.graph.nodes:
            self.held[node] = self._visit(node)

    # ------------------------------------------------------------ numbers

    def _new(self, count: int) -> list[int]:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return list(range(first, first + count))

    def root(self, i: int) -> int:
        """The number that stands for a channel and all that are the same."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _join(self, a: list[int], b: list[int]) -> None:
        for i, j in zip(a, b, strict=True):
            self._parent[self.root(j)] = self.root(i)

    def _block(self, held: Held | None, reason: str) -> None:
        for i in held.ids if held is not None else ():
            self._blocked.setdefault(i, reason)

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

    def _block_all(self, node: fx.Node, reason: str) -> None:
        for given in node.all_input_nodes:
            self._block(self.held[given], reason)

    def _call(self, node: fx.Node, module: nn.Module) -> Held | None:
        held = self._given(node)
        if module._forward_hooks or module._forward_pre_hooks:
            self._block_all(node, f"{node.target} has hooks")
            return None
        if isinstance(module, (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)):
            return self._layer(node, module, held)
        if isinstance(module, PASSING):
            return held
        if self.moves == FACTORS:
            if isinstance(module, INVARIANT):
                return held
            if isinstance(module, SPATIAL) and held is not None and held.axis == SECOND:
                return held
            if is_relu6(module) and not isinstance(module, self.restarts):
                return self._bounded(node, held)
            if isinstance(module, (*_NORMS, nn.LayerNorm, nn.RMSNorm)):
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
        ids = fits if fits is not None else self._new(inputs)
        if fits is None:
            self._block(Held(ids, LAST), f"what {node.target} reads comes from no layer")
        self._read(node, module, ids)
        return Held(self._write(node, module, outputs), LAST if linear else SECOND)

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

    def _read(self, node: fx.Node, module: nn.Module, ids: list[int]) -> None:
        if module not in self._sinks:
            self._sinks[module] = (str(node.target), ids, [node])
        else:
            self._join(self._sinks[module][1], ids)
            self._sinks[module][2].append(node)

    def _write(self, node: fx.Node, module: nn.Module, count: int) -> list[int]:
        if module not in self._sources:
            self._sources[module] = (str(node.target), self._new(count), [node])
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
        axis = SECOND if isinstance(module, _NORMS) else LAST
        if isinstance(module, nn.BatchNorm1d) and given is not None:
            axis = given.axis if given.axis != FLAT else LAST
        return Held(self._write(node, module, weight.numel()), axis)

    def _function(self, node: fx.Node) -> Held | None:
        target: Any = node.target
        if target in _SHAPES and (
            target is not getattr or node.args[1] in ("shape", "ndim", "device", "dtype")
        ):
            return None
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
        if target in _FLATTEN:
            rest = [*node.args[1:], *node.kwargs.values()]
            start = rest[0] if rest else 0
            return self._flattened(node, self._given(node), start, rest[1] if len(rest) > 1 else -1)
        if target in _RESHAPE and len(node.args) == 3 and node.args[2] == -1:
            return self._flattened(node, self._given(node), 1, -1)
        held = self._given(node)
        if target in _MEAN and held is not None and held.axis == SECOND:
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
        for i, top in zip(held.ids, self.largest[node].tolist(), strict=True):
            if top >= RELU6_TOP:
                self._blocked.setdefault(i, f"{node.name} reaches its bound of 6")
            else:
                self._most[i] = min(self._most.get(i, float("inf")), RELU6_TOP / max(top, 1e-12))
        return held

    def _sum(self, node: fx.Node) -> Held | None:
        operands = [self.held.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2]]
        a, b = operands if len(operands) == 2 else (None, None)
        plain = len(node.args) == 2 and not node.kwargs
        if not plain or a is None or b is None or a.axis != b.axis or len(a.ids) != len(b.ids):
            self._block_all(node, f"{node.name} adds something else to it")
            return None
        self._join(a.ids, b.ids)
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

    # ------------------------------------------------------------ regions

    def regions(self) -> list[Region]:
        """Groups of sources and sinks that share channels, in the order of their first sources."""
        blocked: dict[int, str] = {}
        for i, why in self._blocked.items():
            blocked.setdefault(self.root(i), why)
        parent: dict[Any, Any] = {}

        def top(x: Any) -> Any:
            while parent.setdefault(x, x) != x:
                x = parent[x]
            return x

        sides = [("source", m, u) for m, u in self._sources.items()]
        sides += [("sink", m, u) for m, u in self._sinks.items()]
        roots = {(kind, m): [self.root(i) for i in u[1]] for kind, m, u in sides}
        for kind, m, _ in sides:
            for r in dict.fromkeys(roots[kind, m]):
                parent[top(r)] = top((kind, m))
        grouped: dict[Any, list[Any]] = {}
        for kind, m, u in sides:
            grouped.setdefault(top((kind, m)), []).append((kind, m, u))
        made = [self._region(parts, roots, blocked) for parts in grouped.values()]
        return [r for r in made if r.sources and r.sinks]

    def _region(self, parts: list[Any], roots: Any, blocked: dict[int, str]) -> Region:
        number: dict[int, int] = {}
        for kind, m, _ in parts:
            for r in roots[kind, m]:
                number.setdefault(r, len(number))
        uses: dict[str, list[Use]] = {"source": [], "sink": []}
        for kind, m, (name, _, nodes) in parts:
            ids = torch.tensor([number[r] for r in roots[kind, m]])
            uses[kind].append(Use(name, m, ids, nodes))
        free = torch.tensor([r not in blocked for r in number])
        reasons = list(dict.fromkeys(blocked[r] for r in number if r in blocked))
        written = torch.zeros(len(number), dtype=torch.bool)
        for use in uses["source"]:
            written[use.ids] = True
        read = torch.zeros(len(number), dtype=torch.bool)
        for use in uses["sink"]:
            read[use.ids] = True
        tensors = [
            n
            for n, h in self.held.items()
            if h is not None and h.ids and self.root(h.ids[0]) in number
        ]
        most = torch.full((len(number),), float("inf"))
        for i, factor in self._most.items():
            place = number.get(self.root(i))
            if place is not None:
                most[place] = min(float(most[place]), factor)
        return Region(
            uses["source"], uses["sink"], len(number), free & written & read, reasons, tensors, most
        )
