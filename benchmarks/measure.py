"""Measures of a quantized network beside its float form: ratios, interleaved in one process."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 32
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, where it is glibc.

    It gives back what lies at its end, and gets it again, page by page, in the next step: 10 ms of it. Which of two networks in
    one process that is, is chance.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, size in (
                (_MMAP_THRESHOLD, 1 << 30),
                (_TRIM_THRESHOLD, (1 << 31) - 1),
                (_TOP_PAD, 1 << 26),
            ):
                libc.mallopt(option, size)


def data() -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def trainer(model: nn.Module) -> Callable[[], Any]:
    """One training step of a model."""
    images, labels = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def evaluator(model: nn.Module) -> Callable[[], Any]:
    """One forward pass without gradients."""
    images, _ = data()

    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def medians(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median times of both, taking turns, by a clock."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(warm_up + rounds):
        for function, taken in zip((first, second), times, strict=True):
            start = clock()
            function()
            if number >= warm_up:
                taken.append(clock() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def ratio(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int, warm_up: int = 3
) -> float:
    """Median time of ``second`` over that of ``first``, taking turns."""
    one, other = medians(first, second, rounds, warm_up)
    return other / one


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def saved_bytes(model: nn.Module) -> int:
    """:func:`kept_bytes` for the images."""
    return kept_bytes(model, data()[0])


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for the backward pass of one forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum().backward()
    return sum(size for place, size in found.items() if place not in own)


def compare(make_float: Any, make_quant: Any, rounds: int) -> dict[str, float]:
    """Training step in both phases, forward pass, memory and construction, as ratios to the float network.

    Args:
        make_float: makes the float network.
        make_quant: makes the quantized one, given the number of steps to collect statistics over.
        rounds: of each measure.
    """
    model = make_float()
    out: dict[str, float] = {"build_first_seconds": seconds(lambda: make_quant(3))}
    out["build_again_seconds"] = seconds(lambda: make_quant(3))
    collecting = make_quant(10**6)
    out["train_collecting"] = ratio(trainer(model), trainer(collecting), rounds)
    learning = make_quant(2)
    for _ in range(4):
        trainer(learning)()
    out["train"] = ratio(trainer(model), trainer(learning), rounds)
    out["saved_bytes"] = saved_bytes(learning) / saved_bytes(model)
    model.eval()
    learning.eval()
    out["eval"] = ratio(evaluator(model), evaluator(learning), 2 * rounds)
    return out
