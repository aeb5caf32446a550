"""Options for each layer, what they cost, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qframework.graph.batches import Batches
from qframework.graph.operations import count_operations

_FLOAT = 32


@dataclass(frozen=True)
class Option:
    """One number of bits for a group of layers.

    Attributes:
        bits: None for not quantized.
        noise: error that it makes.
        costs: by kinds of budgets.
    """

    bits: int | None
    noise: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """The options of layers that share their bits."""

    names: tuple[str, ...]
    options: list[Option]


class Costs:
    """What bits cost.

    Args:
        sizes: number of weights of each layer.
        operations: multiply-accumulates times bits of the input, of each layer; None where no budget needs them.
        kinds: of budgets.
    """

    def __init__(
        self, sizes: dict[str, int], operations: dict[str, float] | None, kinds: set[str]
    ) -> None:
        self.sizes, self.operations, self.kinds = sizes, operations, kinds
        self.whole = sum(sizes.values())

    def of(self, group: Sequence[str], bits: int | None, kind: str) -> float:
        """The cost of a group with a number of bits."""
        width = _FLOAT if bits is None else bits
        size = sum(self.sizes[n] for n in group) * width
        if kind == "bytes":
            return size / 8
        if kind == "bops":
            assert self.operations is not None
            return sum(self.operations.get(n, 0.0) for n in group) * width
        return size / max(self.whole, 1)


def costs_of(
    model: nn.Module,
    names: Mapping[str, Any],
    data: Batches,
    budgets: Sequence[Mapping[str, float]],
) -> Costs:
    """The costs that some budgets need.

    Raises:
        ValueError: bit operations are asked for, and batches aren't tensors or tuples.
    """
    kinds = {"mean_bits" if k == "metric" else k for b in budgets for k in b}
    operations = None
    if "bops" in kinds:
        first = None if data.is_callable else next(iter(data))
        if first is None or isinstance(first, Mapping):
            raise ValueError(
                "search_bit_widths: a budget of bops needs batches of tensors or tuples"
            )
        args = tuple(first) if isinstance(first, (tuple, list)) else (first,)
        counts = count_operations(model, args)
        operations = {
            n: float((counts[m].macs or 0) * (counts[m].input_bits or _FLOAT))
            for n, m in names.items()
            if m in counts
        }
    return Costs({n: m.weight.numel() for n, m in names.items()}, operations, kinds)


def _path(choices: list[Choice], kind: str) -> list[list[int]]:
    """From the least error down in cost: indices of options, each step the one that costs least error for what it saves."""
    frontiers = [_frontier(c.options, kind) for c in choices]
    places = [0] * len(choices)
    found = [[f[0] for f in frontiers]]
    while True:
        best, ratio = None, float("inf")
        for i, frontier in enumerate(frontiers):
            if places[i] + 1 < len(frontier):
                now = choices[i].options[frontier[places[i]]]
                after = choices[i].options[frontier[places[i] + 1]]
                saved = now.costs[kind] - after.costs[kind]
                price = (after.noise - now.noise) / saved if saved > 0 else float("inf")
                if best is None or price < ratio:
                    best, ratio = i, price
        if best is None:
            return found
        places[best] += 1
        found.append([f[p] for f, p in zip(frontiers, places, strict=True)])


def _frontier(options: list[Option], kind: str) -> list[int]:
    """Options by falling cost that no other one beats, and that no mixture of two others does."""
    order = sorted(range(len(options)), key=lambda i: (options[i].noise, options[i].costs[kind]))
    kept: list[int] = []
    for i in order:
        if not kept or options[i].costs[kind] < options[kept[-1]].costs[kind]:
            kept.append(i)
    hull: list[int] = []
    for i in kept:
        while len(hull) >= 2:
            a, b, c = (options[j] for j in (hull[-2], hull[-1], i))
            first = (b.noise - a.noise) * (b.costs[kind] - c.costs[kind])
            second = (c.noise - b.noise) * (a.costs[kind] - b.costs[kind])
            if first < second:
                break
            hull.pop()
        hull.append(i)
    return hull


def cheapest_within(
    budget: Mapping[str, float],
    choices: list[Choice],
    costs: Costs,
    value_of: Callable[[dict[str, int | None]], float],
) -> tuple[dict[str, int | None], float, float, float]:
    """Bits, cost, predicted error and measured value of the choice for one budget.

    Raises:
        ValueError: no choice meets it.
    """
    (name, limit) = next(iter(budget.items()))
    kind = "mean_bits" if name == "metric" else name
    path = _path(choices, kind)

    def result(places: list[int]) -> tuple[dict[str, int | None], float, float]:
        bits: dict[str, int | None] = {}
        cost = noise = 0.0
        for choice, i in zip(choices, places, strict=True):
            option = choice.options[i]
            bits.update(dict.fromkeys(choice.names, option.bits))
            cost, noise = cost + option.costs[kind], noise + option.noise
        return bits, cost, noise

    if name == "metric":
        low, high = 0, len(path) - 1  # values fall along the path; the last one that is high enough
        if value_of(result(path[0])[0]) < limit:
            raise ValueError(f"search_bit_widths: no candidates reach a metric of {limit}")
        while low < high:
            middle = (low + high + 1) // 2
            if value_of(result(path[middle])[0]) >= limit:
                low = middle
            else:
                high = middle - 1
        found = result(path[low])
        return (*found, value_of(found[0]))
    room = 1e-9 * max(abs(limit), 1)
    places = next((p for p in path if result(p)[1] <= limit + room), None)
    if places is None:
        least = result(path[-1])[1]
        raise ValueError(
            f"search_bit_widths: no candidates meet {name}={limit:g}; the least is {least:g}"
        )
    places = _spend(list(places), choices, kind, limit + room - result(places)[1])
    found = result(places)
    return (*found, value_of(found[0]))


def _spend(places: list[int], choices: list[Choice], kind: str, left: float) -> list[int]:
    """Use what is left of a budget for the changes that lower the error most."""
    while True:
        best: tuple[float, int, int, float] | None = None
        for i, choice in enumerate(choices):
            now = choice.options[places[i]]
            for j, option in enumerate(choice.options):
                more = option.costs[kind] - now.costs[kind]
                gain = now.noise - option.noise
                if gain > 0 and more <= left and (best is None or gain > best[0]):
                    best = (gain, i, j, more)
        if best is None:
            return places
        _, i, j, more = best
        places[i], left = j, left - more
