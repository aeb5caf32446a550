"""From the channels that layers read and write to the regions that share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from qframework.graph.channel_numbers import ChannelNumbers
from qframework.graph.channel_regions import Held, Region, Use

#: For a module its name, the numbers of its channels, and the nodes that call it.
Side = Mapping[nn.Module, tuple[str, list[int], list[fx.Node]]]


def group(
    numbers: ChannelNumbers, sources: Side, sinks: Side, held: Mapping[fx.Node, Held | None]
) -> list[Region]:
    """Groups of sources and sinks that share channels, in the order of their first sources.

    Args:
        numbers: of the channels.
        sources: what writes channels.
        sinks: what reads channels.
        held: the channels of each node's result.
    """
    parent: dict[Any, Any] = {}

    def top(x: Any) -> Any:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    sides = [("source", m, u) for m, u in sources.items()]
    sides += [("sink", m, u) for m, u in sinks.items()]
    roots = {(kind, m): [numbers.root(i) for i in u[1]] for kind, m, u in sides}
    for kind, m, _ in sides:
        for r in dict.fromkeys(roots[kind, m]):
            parent[top(r)] = top((kind, m))
    grouped: dict[Any, list[Any]] = {}
    for kind, m, u in sides:
        grouped.setdefault(top((kind, m)), []).append((kind, m, u))
    blocked = numbers.reasons()
    made = [_region(parts, roots, numbers, blocked, held) for parts in grouped.values()]
    return [r for r in made if r.sources and r.sinks]


def _region(
    parts: list[Any],
    roots: Any,
    numbers: ChannelNumbers,
    blocked: Mapping[int, str],
    held: Mapping[fx.Node, Held | None],
) -> Region:
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
    written, read = (_reached(uses[kind], len(number)) for kind in ("source", "sink"))
    tensors = [
        n for n, h in held.items() if h is not None and h.ids and numbers.root(h.ids[0]) in number
    ]
    most = torch.full((len(number),), float("inf"))
    for i, factor in numbers.most.items():
        place = number.get(numbers.root(i))
        if place is not None:
            most[place] = min(float(most[place]), factor)
    return Region(
        uses["source"], uses["sink"], len(number), free & written & read, reasons, tensors, most
    )


def _reached(uses: list[Use], size: int) -> torch.Tensor:
    """Which channels of a region some modules write, or read."""
    found = torch.zeros(size, dtype=torch.bool)
    for use in uses:
        found[use.ids] = True
    return found
