"""Quantization to integers: by scales that are known, learned, and taken from what is quantized."""

from collections.abc import Callable
from typing import Any

import torch
from kernel_case import Case, values
from torch import Tensor

from qframework.functional import IntegerGrid, ScaleRule, upcast

SIGNED, NARROW, UNSIGNED = (-8.0, 7.0), (-7.0, 7.0), (0.0, 15.0)
#: A size that holds several blocks and pieces of all fast forms, with a ragged end.
LARGE = (6, 3, 1021)
X, IMAGES = values(5, 40), values(2, 3, 5, 9)
SCALE, ZERO = torch.tensor(0.25), torch.tensor(6.0)
OF_CHANNELS = torch.tensor([0.25, 0.5, 0.125]).reshape(1, 3, 1, 1)


# ------------------------------------------------------------ by a scale that is known


def known(
    name: str,
    grid: IntegerGrid,
    x: Tensor = X,
    scale: Tensor = SCALE,
    zero: Tensor | None = None,
    relu: bool = False,
) -> Case:
    numbers = (scale,) if zero is None else (scale, zero)

    def arguments(x: Tensor, s: Tensor, z: Tensor | None = None) -> tuple:
        return x, s, z, grid, relu

    return Case(f"fake_quantize: {name}", (x,), numbers, arguments)


def learned_bounds(
    name: str,
    *how: Any,
    low: float = -5.0,
    scale: Tensor = SCALE,
    zero: Tensor | None = None,
    relu: bool = False,
) -> Case:
    numbers = [scale, torch.tensor(low), torch.tensor(6.0)]
    numbers += [] if zero is None else [zero]

    def arguments(x: Tensor, s: Tensor, low: Tensor, high: Tensor, z: Any = None) -> tuple:
        return x, s, z, IntegerGrid(low, high, *how), relu

    return Case(f"fake_quantize: learned bounds, {name}", (IMAGES,), tuple(numbers), arguments)


def by_a_scale_of_its_own(x: Tensor) -> tuple:
    """One that is made of the values, and 1/4."""
    spread = upcast(x).square().mean()
    return x, 0.25 + (spread - spread.detach()), None, IntegerGrid(*SIGNED), False


INTO = {bounds: IntegerGrid(*bounds) for bounds in (SIGNED, NARROW, UNSIGNED)}
PASSING = {bounds: IntegerGrid(*bounds, "round", False) for bounds in (SIGNED, NARROW, UNSIGNED)}
CLIPPED = {
    bounds: IntegerGrid(*bounds, "round", True, True) for bounds in (SIGNED, NARROW, UNSIGNED)
}
OF_ELEMENTS = 2.0 ** -(values(5, 40, step=1.0, seed=2).abs() % 3)
KNOWN = [
    known("signed", INTO[SIGNED]),
    known("narrow, straight through", PASSING[NARROW]),
    known("large", INTO[SIGNED], values(*LARGE)),
    known("relu", INTO[UNSIGNED], relu=True),
    known("relu, an even maximum", IntegerGrid(0.0, 14.0), relu=True),
    known("relu, large", INTO[UNSIGNED], values(*LARGE), relu=True),
    known("relu, signed", INTO[SIGNED], relu=True),
    known("relu, straight through", PASSING[UNSIGNED], relu=True),
    known("relu, floor", IntegerGrid(*UNSIGNED, "floor"), relu=True),
    known("relu, zero point", INTO[UNSIGNED], zero=ZERO, relu=True),
    *(known(r, IntegerGrid(*SIGNED, r)) for r in ("ceil", "floor", "round_to_zero", "dpu")),
    known("channels", INTO[SIGNED], IMAGES, OF_CHANNELS),
    known("channels, relu", INTO[UNSIGNED], IMAGES, OF_CHANNELS, relu=True),
    known("elements", INTO[SIGNED], scale=OF_ELEMENTS),
    known("clipped first", CLIPPED[SIGNED]),
    known("clipped first, large", CLIPPED[SIGNED], values(*LARGE)),
    known("clipped first, ceil", IntegerGrid(*SIGNED, "ceil", True, True)),
    known("clipped first, channels", CLIPPED[NARROW], IMAGES, OF_CHANNELS),
    known("clipped first, zero point", CLIPPED[UNSIGNED], zero=ZERO),
    known("clipped first, relu", CLIPPED[UNSIGNED], relu=True),
    learned_bounds("clipped first", "round", True, True, zero=torch.tensor(-2.0)),
    known("zero point", INTO[UNSIGNED], zero=ZERO),
    known("zero point, straight through", PASSING[UNSIGNED], zero=ZERO),
    known("zero point, large", INTO[UNSIGNED], values(*LARGE), zero=ZERO),
    known("zero points of channels", INTO[UNSIGNED], IMAGES, OF_CHANNELS, ZERO * 8 * OF_CHANNELS),
    known("one zero point for channels", INTO[UNSIGNED], IMAGES, OF_CHANNELS, ZERO),
    learned_bounds("clamp differentiated"),
    learned_bounds("straight through", "round", False),
    learned_bounds("zero point", zero=torch.tensor(-2.0)),
    learned_bounds("zero point, straight through", "floor", False, zero=torch.tensor(-2.0)),
    learned_bounds("channels", scale=OF_CHANNELS, zero=torch.tensor(-2.0)),
    learned_bounds("relu", low=0.0, relu=True),
    Case("fake_quantize: a scale of its own", (X,), (), by_a_scale_of_its_own),
]


# ------------------------------------------------------------ by a learned scale


def learned(
    name: str,
    stored: Any,
    grid: IntegerGrid,
    x: Tensor = X,
    relu: bool = False,
    **rule: Any,
) -> Case:
    scale = ScaleRule("learned", 16.0, **rule)
    numbers = (torch.as_tensor(stored),)
    name = f"quantize_by_learned_scale: {name}"
    return Case(name, (x,), numbers, lambda x, v: (x, v, grid, scale, relu))


LEARNED = [
    learned("signed", 4.0, INTO[SIGNED], minimum=0.01),
    learned("negative, straight through", -4.0, PASSING[UNSIGNED]),
    learned("at its minimum", 0.5, INTO[UNSIGNED], minimum=4.0),
    learned("relu", 4.0, INTO[UNSIGNED], relu=True, minimum=0.01),
    learned("relu, large", 4.0, INTO[UNSIGNED], values(*LARGE), relu=True),
    learned("relu, floor", 4.0, IntegerGrid(*UNSIGNED, "floor"), relu=True),
    learned("relu, signed", 4.0, INTO[SIGNED], relu=True),
    learned("power of two", 1.7, INTO[UNSIGNED], domain="power_of_two", rounding="ceil"),
    learned("logarithm", 2.0, INTO[SIGNED], domain="log_fp", minimum=0.01),
    learned("channels", -16 * OF_CHANNELS, INTO[SIGNED], IMAGES, minimum=0.01),
    learned("channels, relu", 16 * OF_CHANNELS, INTO[UNSIGNED], IMAGES, relu=True),
]


# ------------------------------------------------------------ by the range of a weight


def weight(*shape: int, axis: int | None = None, low: float = -16.0, high: float = 16.0) -> Tensor:
    """Values from ``low`` to ``high``, each of which one element has, or one of each channel."""
    w = values(*shape, step=1 / 32).clamp(low + 1, high - 1)
    rows = w.reshape(1, -1) if axis is None else w.transpose(0, axis).flatten(1)
    rows[:, 7], rows[:, 2] = high, low
    return rows.view(w.transpose(0, axis or 0).shape).transpose(0, axis or 0).contiguous()


def by_range(
    kind: str,
    name: str,
    w: Tensor,
    bounds: tuple[float, float],
    axis: int | None = None,
    rounding: str = "round",
    threshold: float | None = None,
    **rule: Any,
) -> Case:
    shape = [n if i == axis else 1 for i, n in enumerate(w.shape)] if axis is not None else []
    threshold = threshold or (128.0 if kind == "absmax" else 256.0)
    scale = ScaleRule(kind, threshold, shape=tuple(shape), channel_axis=axis, **rule)
    grid = IntegerGrid(*bounds, rounding, False)
    return Case(f"quantize_by_{kind}: {name}", (w,), (), lambda w: (w, grid, scale))


def by_ranges(kind: str, bounds: tuple[float, float], make: Callable[..., Tensor]) -> list[Case]:
    power = {"domain": "power_of_two", "rounding": "ceil", "minimum": 0.01}
    w, rows = make(6, 40), make(6, 40, axis=0)
    untied = torch.where(w.abs() == 8, 7.75, w)  # the only ones that 127 and 255 steps halve
    odd = {"threshold": 127.0 if kind == "absmax" else 255.0}
    return [
        by_range(kind, "tensor", w, bounds, minimum=0.01),
        by_range(kind, "tensor, no minimum", w, bounds),
        by_range(kind, "tensor, large", make(*LARGE), bounds, minimum=0.01),
        by_range(kind, "tensor, odd threshold", untied, bounds, minimum=0.01, **odd),
        by_range(kind, "tensor, odd threshold, no minimum", untied, bounds, **odd),
        by_range(kind, "tensor, floor", w, bounds, rounding="floor"),
        by_range(kind, "tensor, dpu", w, bounds, rounding="dpu"),
        by_range(kind, "tensor, power of two", w, bounds, **power),
        by_range(kind, "tensor, logarithm", w, bounds, domain="log_fp"),
        by_range(kind, "tensor, at its minimum", w / 1024, bounds, minimum=16.0),
        by_range(kind, "tensor, equal ends", w.abs(), bounds, minimum=0.01),
        by_range(kind, "tensor, negative", -w.abs(), bounds, minimum=0.01),
        by_range(kind, "channels", rows, bounds, 0, minimum=0.01),
        by_range(kind, "channels, no minimum", rows, bounds, 0),
        by_range(kind, "channels, short rows", make(6, 2, 5, axis=0), bounds, 0),
        by_range(kind, "channels, large", make(*LARGE, axis=0), bounds, 0),
        by_range(kind, "channels, power of two", rows, bounds, 0, **power),
        by_range(kind, "channels, equal ends", rows.abs(), bounds, 0, minimum=0.01),
        by_range(kind, "channels, negative", -rows.abs(), bounds, 0, minimum=0.01),
        by_range(kind, "channels second", make(4, 6, 25, axis=1), bounds, 1, minimum=0.01),
        by_range(kind, "channels second, power of two", make(4, 6, 5, axis=1), bounds, 1, **power),
    ]


def off_centre(*shape: int, axis: int | None = None) -> Tensor:
    return weight(*shape, axis=axis, low=-6.0, high=10.0)


BYTES, SHIFTED_BYTES = (-128.0, 127.0), (0.0, 255.0)
BY_RANGE = [
    *by_ranges("absmax", BYTES, weight),
    by_range("absmax", "zeros", torch.zeros(6, 40), BYTES, minimum=0.5),
    by_range("absmax", "zeros of channels", torch.zeros(6, 40), BYTES, 0, minimum=0.5),
    *by_ranges("minmax", SHIFTED_BYTES, off_centre),
    by_range("minmax", "signed", off_centre(6, 40), BYTES),
    by_range("minmax", "zeros", torch.zeros(6, 40), SHIFTED_BYTES, minimum=0.5),
]


# ------------------------------------------------------------ by a percentile


def by_percentile(
    name: str, from_top: int, grid: IntegerGrid, relu: bool = False, **rule: Any
) -> Case:
    """The magnitude of that rank from the top is 16, and that of one element."""
    x = values(*LARGE).clamp(-15, 15)
    tops = torch.tensor([16.0, 20.0, 24.0])[:from_top]
    x.view(-1)[1000 : 1000 * (from_top + 1) : 1000] = tops if relu else -tops
    scale = ScaleRule("learned", 128.0, **rule)

    def arguments(x: Tensor) -> tuple:
        return x, x.numel() - from_top + 1, grid, scale, relu

    return Case(f"quantize_by_percentile: {name}", (x,), (), arguments, differentiated=2)


BY_PERCENTILE = [
    by_percentile("largest", 1, IntegerGrid(*BYTES), minimum=0.01),
    by_percentile("third", 3, IntegerGrid(*BYTES)),
    by_percentile("shaped", 3, IntegerGrid(*BYTES), shape=(1, 1, 1)),
    by_percentile("straight through", 3, IntegerGrid(*BYTES, "round", False)),
    by_percentile("relu", 2, IntegerGrid(*SHIFTED_BYTES), relu=True, minimum=0.01),
    by_percentile("at its minimum", 2, IntegerGrid(*BYTES), minimum=32.0),
]

CASES = [*KNOWN, *LEARNED, *BY_RANGE, *BY_PERCENTILE]
