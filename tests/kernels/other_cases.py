"""Statistics, other formats, sequences and products."""

from typing import Any

import torch
from integer_cases import IMAGES, LARGE, OF_CHANNELS, SCALE, X, weight
from kernel_case import Case, values
from torch import Tensor

from qframework.functional import (
    GRURanges,
    IntegerGrid,
    LSTMRanges,
    MinifloatFormat,
    MinifloatGrid,
    Range,
    RNNRanges,
    ScaleRule,
    fake_quantize,
    quantize_by_learned_scale,
    quantize_by_percentile,
)

# ------------------------------------------------------------ statistics


def distinct(*shape: int) -> Tensor:
    """Numbers of which no two have the same magnitude, in half precision neither."""
    n = torch.Size(shape).numel()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    magnitudes = (torch.arange(n) + 0x3800).to(torch.int16).view(torch.bfloat16).float()
    return (magnitudes * torch.tensor([1.0, -1.0]).repeat(n)[:n])[order].view(shape)


def ranked(name: str, x: Tensor, *how: Any) -> Case:
    return Case(f"kth_smallest: {name}", (x,), (), lambda x: (x, *how))


MANY = distinct(3, 1500)
STATISTICS = [
    Case("abs_max: one", (weight(5, 8, low=-20.0),), (), lambda x: (x, None, False)),
    Case("abs_max: equals", (weight(5, 8),), (), lambda x: (x, None, False)),
    Case("abs_max: zeros", (torch.zeros(5),), (), lambda x: (x, None, False)),
    Case("abs_max: rows", (MANY,), (), lambda x: (x, -1, True)),
    Case("abs_max: rows, squeezed", (MANY,), (), lambda x: (x, 1, False)),
    Case("extreme: largest of rows", (MANY,), (), lambda x: (x, True, -1, False)),
    Case("extreme: smallest of rows", (MANY,), (), lambda x: (x, False, 1, True)),
    Case("extreme: of short rows", (distinct(40, 8),), (), lambda x: (x, False, -1, True)),
    ranked("largest", MANY, 4500, False, None, False),
    ranked("smallest magnitude", MANY, 1, True, None, False),
    ranked("near the top", MANY, 4493, True, None, False),
    ranked("near the bottom", MANY, 8, False, None, True),
    ranked("in the rest behind the blocks", MANY.sort().values, 4499, False, None, False),
    ranked("of rows", MANY, 1490, True, 1, False),
    ranked("of columns", MANY, 1, False, 0, True),
]


# ------------------------------------------------------------ other formats

E4M3 = MinifloatFormat(3, 7, 448.0)
E5M2 = MinifloatFormat(2, 15, 57344.0, overflow=float("inf"))
E2M1 = MinifloatFormat(1, 1, 6.0, signed=False)
SIZES = torch.tensor([2.0**-20, 2.0**-7, 2.0**-3, 1.0, 32.0, 256.0]).reshape(6, 1)


def minifloat(name: str, format: MinifloatFormat, scale: Any, *how: Any) -> Case:
    numbers = () if scale is None else (torch.as_tensor(scale),)
    how = how or ("round", True)

    def arguments(x: Tensor, s: Tensor | None = None) -> tuple:
        return x, s, format, *how

    return Case(f"minifloat_quantize: {name}", (values(6, 50) * SIZES,), numbers, arguments)


def signs(name: str, scale: Tensor, clamp_gradient: bool = False, x: Tensor = X) -> Case:
    name = f"quantize_to_signs: {name}"
    return Case(name, (x,), (scale,), lambda x, s: (x, s, clamp_gradient))


def codebook(name: str, scale: Tensor, entries: list[float]) -> Case:
    numbers = (scale, torch.tensor(entries))
    return Case(f"codebook_quantize: {name}", (X,), numbers, lambda x, s, b: (x, s, b))


FORMATS = [
    minifloat("no scale", E4M3, None),
    minifloat("one scale", E4M3, 0.25),
    minifloat("scales of rows", E4M3, torch.full((6, 1), 0.25)),
    minifloat("infinities", E5M2, 0.25),
    minifloat("unsigned", E2M1, 0.25),
    minifloat("unsigned, infinities", E5M2._replace(signed=False), 0.25),
    minifloat("straight through", E4M3, 0.25, "floor", False),
    minifloat("straight through, half to even", E4M3, 0.25, "round", False),
    minifloat("straight through, infinities", E5M2, 0.25, "round", False),
    signs("one scale", SCALE),
    signs("one scale, large", SCALE, x=values(*LARGE)),
    signs("channels", OF_CHANNELS, x=IMAGES),
    signs("clamped", SCALE, True),
    signs("clamped, channels", OF_CHANNELS, True, x=IMAGES),
    codebook("one scale", torch.tensor(0.25), [-9.0, -4.5, -1.25, 0.0, 0.75, 3.0, 7.0]),
    codebook("two entries", torch.tensor(0.125), [-3.0, 4.0]),
    codebook("scales of rows", torch.full((5, 1), 0.5), [-3.0, -1.0, 1.0, 4.0]),
]


# ------------------------------------------------------------ by the largest magnitude of channels, rows and groups

ROWS = values(6, 64) * SIZES
UNTIED = (
    ROWS + torch.arange(384).view(6, 64) / 4096 * SIZES
)  # no two of a row have the same magnitude
POWERS = {"domain": "power_of_two", "rounding": "floor", "minimum": 2.0**-30}
MINIFLOATS = MinifloatGrid(E4M3)


def by_absmax(name: str, w: Tensor, grid: Any, threshold: float, **rule: Any) -> Case:
    scale = ScaleRule("absmax", threshold, **rule)
    return Case(f"quantize_by_absmax: {name}", (w,), (), lambda w: (w, grid, scale))


CLAMPED = IntegerGrid(-100.0, 100.0)
BY_ABSMAX = [
    by_absmax("clamp differentiated", ROWS, CLAMPED, 128.0, minimum=0.01),
    by_absmax("clamp differentiated, rows", ROWS, CLAMPED, 128.0, reduced_axis=-1),
    by_absmax("integers of rows", UNTIED, IntegerGrid(-128.0, 127.0, "round", False), 128.0, reduced_axis=1),
    by_absmax("integers of columns", ROWS, CLAMPED, 128.0, reduced_axis=0),
    by_absmax("integers of groups", ROWS.view(6, 2, 32), CLAMPED, 128.0, reduced_axis=-1, **POWERS),
    by_absmax("integers of groups inside", ROWS.view(6, 4, 16).mT.contiguous(), CLAMPED, 128.0, reduced_axis=1),
    by_absmax("minifloats of the tensor", UNTIED, MINIFLOATS, 512.0, minimum=0.01),
    by_absmax("minifloats of channels", UNTIED, MINIFLOATS, 512.0, shape=(6, 1), channel_axis=0),
    by_absmax("minifloats of rows", UNTIED, MINIFLOATS, 512.0, reduced_axis=-1),
    by_absmax("minifloats of groups", UNTIED.view(6, 2, 32), MINIFLOATS, 256.0, reduced_axis=-1, **POWERS),
    by_absmax("minifloats of groups inside", UNTIED.view(2, 3, 16, 4), MINIFLOATS, 256.0, reduced_axis=2, **POWERS),
    by_absmax("minifloats, infinities", UNTIED, MinifloatGrid(E5M2), 32768.0, reduced_axis=-1, **POWERS),
    by_absmax("unsigned minifloats", UNTIED, MinifloatGrid(E2M1, "ceil"), 8.0, reduced_axis=-1, **POWERS),
    by_absmax("below the minimum", ROWS.view(6, 2, 32), MINIFLOATS, 256.0, reduced_axis=-1, **POWERS | {"minimum": 3.0}),
    by_absmax("zeros of rows", torch.zeros(4, 32), MINIFLOATS, 256.0, reduced_axis=-1, **POWERS),
]  # fmt: skip


# ------------------------------------------------------------ sequences

SUMS, OUTPUTS = IntegerGrid(-40.0, 40.0), IntegerGrid(-12.0, 12.0, "floor")
GATES, PASSING = IntegerGrid(0.0, 13.0), IntegerGrid(-20.0, 20.0, "round", False)
STEPS, BATCH, SIZE = 3, 2, 4


def sequence(kind: Any, name: str, blocks: int, grids: list[Any], make: Any, *more: Tensor) -> Case:
    """A case whose numbers are the scales of the quantizers that there are."""
    operands = (
        values(STEPS, BATCH, blocks * SIZE),
        values(SIZE, blocks * SIZE, seed=2) / 4,
        values(BATCH, SIZE, seed=3) / 4,
        *more,
    )
    scales = [torch.tensor(2.0**-4) for grid in grids if grid is not None]

    def arguments(*tensors: Tensor) -> tuple:
        left = iter(tensors[len(operands) :])
        ranges = kind(*(None if grid is None else Range(next(left), grid) for grid in grids))
        return make(*tensors[: len(operands)], ranges)

    return Case(name, operands, tuple(scales), arguments)


def rnn(name: str, *grids: Any, relu: bool = False, reverse: bool = False) -> Case:
    def make(products: Tensor, hidden: Tensor, first: Tensor, ranges: RNNRanges) -> tuple:
        return products, hidden, first, ranges, relu, reverse

    return sequence(RNNRanges, f"rnn_sequence: {name}", 1, list(grids), make)


def lstm(name: str, *grids: Any, reverse: bool = False) -> Case:
    def make(x: Tensor, hidden: Tensor, h: Tensor, c: Tensor, ranges: LSTMRanges) -> tuple:
        return x, hidden, (h, c), ranges, reverse

    state = values(BATCH, SIZE, seed=5) / 2
    return sequence(LSTMRanges, f"lstm_sequence: {name}", 4, list(grids), make, state)


def gru(name: str, *grids: Any, bias: bool = True, reverse: bool = False) -> Case:
    def make(x: Tensor, hidden: Tensor, h: Tensor, *rest: Any) -> tuple:
        return x, hidden, rest[0] if bias else None, h, rest[-1], reverse

    biases = (values(SIZE, seed=6),) if bias else ()
    return sequence(GRURanges, f"gru_sequence: {name}", 3, list(grids), make, *biases)


def lstm_of_columns() -> Case:
    """Gates of several widths, side by side."""
    columns = 4 * SIZE
    low = torch.full((columns,), -100.0)
    bounds = IntegerGrid(low, -low - torch.arange(columns))

    def arguments(x: Tensor, hidden: Tensor, h: Tensor, c: Tensor, s: Tensor) -> tuple:
        wide = IntegerGrid(bounds.minimum.to(x.dtype), bounds.maximum.to(x.dtype))
        return x, hidden, (h, c), LSTMRanges(Range(s, wide), *[None] * 5), False

    operands = lstm("", *[None] * 6).values
    scales = torch.tensor([2.0**-4, 2.0**-5]).repeat(columns // 2)
    return Case("lstm_sequence: scales of columns", operands, (scales,), arguments)


SEQUENCES = [
    rnn("all", SUMS, OUTPUTS),
    rnn("none, relu, backwards", None, None, relu=True, reverse=True),
    rnn("straight through", PASSING, OUTPUTS, relu=True),
    lstm("all", SUMS, GATES, GATES, SUMS, OUTPUTS, SUMS),
    lstm("none, backwards", *[None] * 6, reverse=True),
    lstm("gates apart", SUMS, GATES, OUTPUTS, None, PASSING, SUMS),
    lstm("some gates", None, None, GATES, SUMS, None, OUTPUTS),
    lstm_of_columns(),
    gru("all", SUMS, SUMS, PASSING, GATES, OUTPUTS, SUMS),
    gru("none, no bias, backwards", *[None] * 6, bias=False, reverse=True),
    gru("some", None, SUMS, None, GATES, None, OUTPUTS),
]


# ------------------------------------------------------------ products of quantized values


def product(name: str, x: Tensor, w: Tensor, *more: Any, bias: bool = True) -> Case:
    """Of values that know what they were made of."""
    transposed = name.startswith("transposed")
    out = w.shape[1] * more[3] if transposed else w.shape[0]
    biases = (values(out),) if bias else ()

    def arguments(x: Tensor, w: Tensor, *rest: Tensor) -> tuple:
        y = fake_quantize(x, rest[-1], None, IntegerGrid(0.0, 15.0), True)
        return y, w, rest[0] if bias else None, *more

    return Case(name, (x, w, *biases), (torch.tensor(0.25),), arguments)


def of_learned_scale(x: Tensor, w: Tensor, stored: Tensor) -> tuple:
    rule = ScaleRule("learned", 16.0)
    return quantize_by_learned_scale(x, stored, IntegerGrid(-8.0, 7.0), rule)[0], w, None


def of_percentile(x: Tensor, w: Tensor) -> tuple:
    rule = ScaleRule("learned", 8.0)
    return quantize_by_percentile(x, x.numel(), IntegerGrid(-8.0, 7.0), rule)[0], w, None


LINEAR = values(4, 8, seed=2)
PRODUCTS = [
    product("linear: rows", values(5, 8), LINEAR),
    product("linear: sequences, no bias", values(3, 5, 8), LINEAR, bias=False),
    Case("linear: by a learned scale", (values(5, 8), LINEAR), (torch.tensor(4.0),), of_learned_scale),
    Case("linear: by a percentile", (weight(640, 8, low=-15.0), LINEAR), (), of_percentile),
    product("convolution: 1d", values(2, 6, 9), values(4, 6, 3, seed=2), 2, 1, 1, 1),
    product("convolution: 2d", values(2, 6, 9, 8), values(4, 3, 3, 3, seed=2), (1, 2), 1, 2, 2),
    product("convolution: 3d", values(2, 3, 4, 5, 4), values(4, 3, 2, 2, 2, seed=2), 1, 0, 1, 1, bias=False),
    product("transposed_convolution: 2d", values(2, 6, 5, 4), values(6, 2, 3, 3, seed=2), 2, 1, (1, 0), 2, 1),
    product("transposed_convolution: 1d", values(2, 3, 5), values(3, 4, 3, seed=2), 1, 0, 0, 1, 2, bias=False),
]  # fmt: skip

CASES = [*STATISTICS, *FORMATS, *BY_ABSMAX, *SEQUENCES, *PRODUCTS]
