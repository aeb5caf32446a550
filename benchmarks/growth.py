"""What grows in long work: memory, Python objects and the time of a step; nothing should."""

from __future__ import annotations

import gc
import resource
import sys
import time

import torch
from torch import nn

from qframework.layers import QuantConv2d, QuantLinear, QuantReLU


def _megabytes() -> float:
    """The largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _network() -> nn.Module:
    return nn.Sequential(
        QuantConv2d(3, 8, 3), QuantReLU(collect_stats_steps=50), nn.Flatten(), QuantLinear(288, 10)
    )


def measure(steps: int = 2000, constructions: int = 10_000) -> dict[str, float]:
    """How much the second half of the work takes beside the first.

    Args:
        steps: of training.
        constructions: of layers.
    """
    model, x = _network(), torch.randn(16, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    marks = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(steps // 2):
            _step(model, optimizer, x)
        marks.append((_objects(), _megabytes(), time.perf_counter() - start))
    found = {
        "long_objects": float(marks[1][0] - marks[0][0]),
        "long_megabytes": marks[1][1] - marks[0][1],
        "long_time": marks[1][2] / marks[0][2],
    }
    built = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(constructions // 2):
            QuantLinear(4, 4, weight_bit_width=4)
        built.append((_objects(), _megabytes(), time.perf_counter() - start))
    found["constructions_objects"] = float(built[1][0] - built[0][0])
    found["constructions_megabytes"] = built[1][1] - built[0][1]
    found["constructions_time"] = built[1][2] / built[0][2]
    return found
