"""Networks of every number format beside their float form: training, evaluation, frozen evaluation, bytes kept.

The networks are described by a *kit*, which makes layers; a peer has a kit of its own, see :mod:`benchmarks.peer`.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.measure import keep_freed_memory, kept_bytes, medians

#: What is measured of each row; all are ratios to the float network.
MEASURES = ("train", "eval", "frozen", "bytes")
#: What times are measured by; that of the processor alone, where others use the machine.
CLOCK: list[Callable[[], float]] = [time.perf_counter]
LIMITS = Path(__file__).with_name("limits.json")


class Kit(Protocol):
    """Makes the layers of a library."""

    def conv(self, i: int, o: int, size: int, kind: str, **how: Any) -> nn.Module:
        """A convolution without bias."""

    def relu(self, kind: str) -> nn.Module:
        """An activation."""

    def linear(self, i: int, o: int, kind: str) -> nn.Module:
        """A linear layer."""

    def encoder(self) -> nn.Module:
        """A transformer encoder layer of 256 features, 4 heads, 1024 hidden ones."""

    def add(self, kind: str) -> nn.Module:
        """A sum of two operands."""


class _Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class FloatKit:
    """torch's own layers."""

    def conv(self, i: int, o: int, size: int, kind: str, **how: Any) -> nn.Module:
        """A convolution without bias."""
        return nn.Conv2d(i, o, size, bias=False, **how)

    def relu(self, kind: str) -> nn.Module:
        """A ReLU."""
        return nn.ReLU()

    def linear(self, i: int, o: int, kind: str) -> nn.Module:
        """A linear layer."""
        return nn.Linear(i, o)

    def encoder(self) -> nn.Module:
        """A transformer encoder layer."""
        return nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)

    def add(self, kind: str) -> nn.Module:
        """A sum."""
        return _Sum()


def depthwise(kit: Kit, kind: str) -> nn.Module:
    """Depthwise-separable convolutions on images of 32 x 32."""
    layers: list[nn.Module] = [kit.conv(3, 32, 3, kind, padding=1), nn.BatchNorm2d(32)]
    layers.append(kit.relu(kind))
    for i, o, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
        layers += [
            kit.conv(i, i, 3, kind, padding=1, stride=stride, groups=i),
            nn.BatchNorm2d(i),
            kit.relu(kind),
            kit.conv(i, o, 1, kind),
            nn.BatchNorm2d(o),
            kit.relu(kind),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def mlp(kit: Kit, kind: str) -> nn.Module:
    """1024-4096-1024."""
    return nn.Sequential(kit.linear(1024, 4096, kind), nn.ReLU(), kit.linear(4096, 1024, kind))


def encoder(kit: Kit, kind: str) -> nn.Module:
    """One layer."""
    return kit.encoder()


class Small(nn.Module):
    """A residual network of few channels, whose layers pass quantized tensors where a library has them."""

    def __init__(self, kit: Kit, kind: str) -> None:
        super().__init__()
        self.stem, self.relu = kit.conv(3, 16, 3, kind, padding=1), kit.relu(kind)
        self.first, self.relu1 = kit.conv(16, 16, 3, kind, padding=1), kit.relu(kind)
        self.second, self.add = kit.conv(16, 16, 3, kind, padding=1), kit.add(kind)
        self.relu2, self.pool = kit.relu(kind), nn.MaxPool2d(2)
        self.third, self.relu3 = kit.conv(16, 32, 3, kind, padding=1), kit.relu(kind)
        self.last, self.head = (
            nn.Sequential(nn.MaxPool2d(16), nn.Flatten()),
            kit.linear(32, 10, kind),
        )

    def forward(self, x: Any) -> Any:
        """Logits."""
        x = self.relu(self.stem(x))
        x = self.relu2(self.add(self.second(self.relu1(self.first(x))), x))
        x = self.relu3(self.third(self.pool(x)))
        y = self.head(self.last(x))
        return y if isinstance(y, Tensor) else y.value


class Row(NamedTuple):
    """One network.

    Attributes:
        what: it is, for people.
        kind: what the kit is asked for.
        make: from a kit and a kind to the network.
        shape: of the input.
        goals: of :data:`MEASURES`, None for none.
    """

    what: str
    kind: str
    make: Callable[[Kit, str], nn.Module]
    shape: tuple[int, ...]
    goals: tuple[float | None, ...]


_MLP = (256, 1024)
ROWS = {
    row.kind: row
    for row in (
        Row("depthwise net, 4 bits", "depthwise", depthwise, (16, 3, 32, 32), (1.15, None, 1.05, 1.3)),
        Row("MLP, int8", "int8", mlp, _MLP, (1.15, None, 1.05, 1.3)),
        Row("MLP, 4-bit weights, 16 rows", "weights4", mlp, (16, 1024), (1.6, None, 1.05, 2.0)),
        Row("MLP, FP8 E4M3", "fp8", mlp, _MLP, (1.25, None, 1.05, 1.3)),
        Row("MLP, MXFP8", "mxfp8", mlp, _MLP, (1.25, None, 1.05, 1.3)),
        Row("MLP, shifted uint8", "shifted", mlp, _MLP, (1.25, None, 1.05, 1.3)),
        Row("MLP, dynamic int8", "dynamic", mlp, _MLP, (1.25, None, 1.05, 1.3)),
        Row("encoder layer, int8", "encoder", encoder, (8, 64, 256), (1.25, None, 1.05, 1.3)),
        Row("small net, quantized tensors", "small", Small, (8, 3, 32, 32), (1.4, None, 1.4, 1.3)),
    )
}  # fmt: skip
#: Further formats, granularities and batches, measured with ``--all``.
MORE = {
    row.kind: row
    for row in (
        *(
            Row(f"MLP, int8, {n} rows", f"int8 x{n}", mlp, (n, 1024), (None, None, None, None))
            for n in (1, 16, 64)
        ),
        *(
            Row(f"MLP, {kind}", kind, mlp, _MLP, (None, None, None, None))
            for kind in ("per_tensor", "per_group", "nvfp4", "fp4", "power_of_two", "nf4", "ternary",
                         "binary", "dynamic_row", "bfloat16")
        ),
        *(
            Row(f"depthwise net, {kind}", f"conv {kind}", depthwise, (16, 3, 32, 32), (None,) * 4)
            for kind in ("fp8", "mxfp8", "shifted", "dynamic")
        ),
    )
}  # fmt: skip


def _trainer(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _evaluator(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def measure_row(
    row: Row,
    kit: Kit,
    rounds: int,
    freeze: Callable[[nn.Module], None] | None,
    compiled: bool = False,
) -> dict[str, float]:
    """The ratios of one network.

    Args:
        row: the network.
        kit: makes the quantized layers.
        rounds: of each measure.
        freeze: what is done to the model before frozen evaluation; None where a library has nothing of the kind.
        compiled: measure both under ``torch.compile``.
    """
    torch.manual_seed(0)
    plain = row.make(FloatKit(), row.kind)
    quant = row.make(kit, row.kind.removeprefix("conv ").split(" x")[0])
    x = torch.randn(row.shape)
    if row.kind == "bfloat16":
        plain, quant, x = plain.bfloat16(), quant.bfloat16(), x.bfloat16()
    # As inside a network: scales of inputs are learned, which takes their gradient anyway.
    x.requires_grad_(row.make is mlp)
    for _ in range(6):  # statistics are collected
        _trainer(quant, x)()
    used: list[Any] = [plain, quant]
    if compiled:
        torch.compiler.reset()
        used = [torch.compile(m) for m in used]
    out = {}

    def ratio(make: Callable[[Any, Tensor], Callable[[], None]], count: int) -> float:
        first, second = (make(m, x) for m in used)
        one, other = medians(first, second, count, 5, CLOCK[0])
        return other / one

    out["train"] = ratio(_trainer, rounds)
    if not compiled:
        out["bytes"] = kept_bytes(quant, x) / kept_bytes(plain, x)
    plain.eval()
    quant.eval()
    out["eval"] = ratio(_evaluator, 2 * rounds)
    if freeze is not None:
        freeze(quant)
        if compiled:
            torch.compiler.reset()
            used = [torch.compile(m) for m in (plain, quant)]
        out["frozen"] = ratio(_evaluator, 2 * rounds)
    return out


def measure(
    kit: Kit,
    rounds: int,
    freeze: Callable[[nn.Module], None] | None,
    names: Iterable[str] = (),
    compiled: bool = False,
) -> dict[str, dict[str, float]]:
    """The ratios of all networks that a kit can make.

    Args:
        kit: makes the quantized layers; a ``KeyError`` says that it doesn't know a kind.
        rounds: of each measure.
        freeze: see :func:`measure_row`.
        names: of the networks, all of :data:`ROWS` when there are none.
        compiled: measure both under ``torch.compile``.
    """
    keep_freed_memory()
    found = {}
    for name in names or ROWS:
        try:
            row = (ROWS | MORE)[name]
            found[name] = measure_row(row, copy.copy(kit), rounds, freeze, compiled)
        except KeyError as error:
            if name not in ROWS | MORE:
                raise SystemExit(f"no row {name!r}; there are {', '.join(ROWS | MORE)}") from error
    return found


def means(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Geometric means of the nine rows, of what all of them have."""
    rows = [found[name] for name in ROWS if name in found]
    shared = [m for m in MEASURES if rows and all(m in row for row in rows)]
    return {m: math.exp(sum(math.log(row[m]) for row in rows) / len(rows)) for m in shared}


def exceeded(found: dict[str, dict[str, float]]) -> list[str]:
    """What is beyond the limits kept in limits.json, for people."""
    limits: dict[str, dict[str, float]] = json.loads(LIMITS.read_text())
    return [
        f"{name}, {measure}: {found[name][measure]:.3g}, the limit is {limit:g}"
        for name, row in limits.items()
        for measure, limit in row.items()
        if name in found and found[name].get(measure, 0.0) > limit
    ]
