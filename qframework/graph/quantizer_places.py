"""Where the quantizers of a traced model's activations stand, and which of them share a scale."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qframework.graph.graph_modules import ADDITIONS, DROPOUTS, JOINS, free_name

#: Modules whose result holds elements of their input alone.
PRESERVING = (
    *DROPOUTS, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.Identity,
)  # fmt: skip
#: Functions and methods that do.
PRESERVING_FUNCTIONS = (torch.flatten, "flatten", "contiguous", torch.squeeze, "squeeze")
#: Modules whose result has the sign of their input.
SIGN_PRESERVING = (
    *PRESERVING, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
#: Functions and methods that do.
SIGN_FUNCTIONS = (
    *PRESERVING_FUNCTIONS, torch.reshape, "reshape", "view", torch.transpose, "transpose", "permute",
    torch.permute, "t", operator.getitem,
)  # fmt: skip


@dataclass(eq=False)
class Place:
    """One quantizer to be.

    Attributes:
        name: of its module in the model.
        float_module: the activation that it stands for; None for an identity.
        signed: whether it has negative values.
        partner: another place with the same scale; None for none.
        same_signs: other places that have negative values where it has.
    """

    name: str
    float_module: nn.Module | None
    signed: bool
    partner: Place | None = None
    same_signs: list[Place] | None = None

    @property
    def leader(self) -> Place:
        """The place whose scale it has."""
        place = self
        while place.partner is not None:
            place = place.partner
        return place


class Stand(nn.Module):
    """Stands in the graph for a quantizer that is built later."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Any) -> Any:
        """The input."""
        return x


class Places:
    """The quantizers of one model's activations.

    Args:
        model: a graph of modules; identities are inserted into it.
        activations: which modules become quantized activations.
        unsigned: those of them without negative results.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        activations: tuple[type[nn.Module], ...],
        unsigned: tuple[type[nn.Module], ...],
    ) -> None:
        self.model, self.graph = model, model.graph
        self.all: list[Place] = []
        self._activations, self._unsigned = activations, unsigned
        for node in self.graph.nodes:
            module = self.module(node)
            if type(module) in activations:
                place = Place(str(node.target), module, not isinstance(module, unsigned))
                self._put(str(node.target), place)

    # ------------------------------------------------------------ looking

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.model.get_submodule(str(node.target))
        return None

    def place(self, node: Any) -> Place | None:
        """The quantizer that a node calls."""
        module = self.module(node)
        return module.place if isinstance(module, Stand) else None

    def makers(self, node: Any) -> list[Any]:
        """Nodes that make a tensor's numbers, what keeps them left out."""
        module = self.module(node)
        keeps = isinstance(module, PRESERVING) if module is not None else False
        if isinstance(node, fx.Node) and (
            keeps or (node.op != "call_module" and node.target in PRESERVING_FUNCTIONS)
        ):
            return self.makers(node.args[0])
        if isinstance(node, fx.Node) and node.target in JOINS:
            return [m for part in node.args[0] for m in self.makers(part)]  # type: ignore[union-attr]
        return [node]

    def is_quantized(self, node: Any) -> bool:
        """Whether a tensor comes from quantizers, of one scale if from several."""
        found = [self.place(m) for m in self.makers(node)]
        return all(p is not None for p in found) and len({p.leader for p in found if p}) == 1

    def is_unsigned(self, node: Any) -> bool:
        """Whether a tensor has no negative numbers."""
        place = self.place(node)
        if place is not None:
            if place.float_module is not None:
                return isinstance(place.float_module, self._unsigned)
            return self.is_unsigned(node.args[0])
        if not isinstance(node, fx.Node):
            return False
        module = self.module(node)
        if module is not None:
            return isinstance(module, SIGN_PRESERVING) and self.is_unsigned(node.args[0])
        if node.target in ADDITIONS:
            return all(self.is_unsigned(a) for a in node.args[:2])
        if node.target in JOINS:
            return all(self.is_unsigned(a) for a in node.args[0])  # type: ignore[union-attr]
        return (
            node.op != "placeholder"
            and node.target in SIGN_FUNCTIONS
            and self.is_unsigned(node.args[0])
        )

    def are_all_quantized(self, users: Any) -> bool:
        """Whether all that read a tensor are quantizers, batch norms in between left out."""
        found = []
        for user in users:
            module = self.module(user)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                found.append(self.are_all_quantized(user.users))
            else:
                found.append(self.place(user) is not None)
        return bool(found) and all(found)

    # ------------------------------------------------------------ inserting

    def _put(self, name: str, place: Place) -> None:
        where, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(where), last, Stand(place))
        self.all.append(place)

    def after(self, node: fx.Node, suffix: str, signed: bool | None = None) -> Place:
        """Insert an identity behind a node; those that read it read the identity."""
        name = free_name(self.model, node.name + suffix)
        place = Place(name, None, (not self.is_unsigned(node)) if signed is None else signed)
        self._put(name, place)
        with self.graph.inserting_after(node):
            call = self.graph.call_module(name, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        return place

    def before(self, node: fx.Node, index: int, suffix: str) -> Place:
        """Insert an identity in front of a node's argument."""
        given: Any = node.args[index]
        name = free_name(self.model, node.name + suffix)
        place = Place(name, None, not self.is_unsigned(given))
        self._put(name, place)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (given,))
        node.update_arg(index, call)
        return place

    # ------------------------------------------------------------ sharing

    def align(self) -> None:
        """Let the operands of every addition and concatenation have one scale, those of concatenations one sign too."""
        for node in list(self.graph.nodes):
            operands: Any = None
            if node.op != "call_module" and node.target in ADDITIONS and len(node.args) == 2:
                operands = node.args
            elif node.op == "call_function" and node.target in JOINS:
                operands = node.args[0]
            if operands is None or not all(isinstance(o, fx.Node) for o in operands):
                continue
            places = []
            for operand in operands:
                for maker in self.makers(operand):
                    place = self.place(maker)
                    places.append(self.after(maker, "_aligned") if place is None else place)
            for other in places[1:]:
                if other.leader is not places[0].leader:
                    other.leader.partner = places[0].leader
            if node.target in JOINS and any(p.signed for p in places):
                for place in places:
                    place.signed = True
