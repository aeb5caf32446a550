"""A machine that computes with integers only, as hardware would: what layers are compared with.

It takes parameters and scales from a layer, and nothing else. Tensors are integers with a scale; products and sums are
those of int64; a result is scaled to the next grid in one multiplication, rounded half to even and clamped; functions
are tables over the integers that occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qframework.graph import calibration_mode
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)

#: Quantizers of weights, of signed and of unsigned activations.
FLOAT = (Int8WeightPerTensorFloat, Int8ActPerTensorFloat, Uint8ActPerTensorFloat)
POWERS_OF_TWO = (
    Int8WeightPerTensorFixedPoint,
    Int8ActPerTensorFixedPoint,
    Uint8ActPerTensorFixedPoint,
)
#: With scales that are powers of two float32 is exact too, but for functions.
ARITHMETIC = {
    "float-scales-float64": (FLOAT, torch.float64),
    "powers-of-two-float32": (POWERS_OF_TWO, torch.float32),
}


class Integers(NamedTuple):
    """``(codes - zero) * scale``; codes and zero point int64, the scale float64."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | int = 0

    @property
    def centered(self) -> Tensor:
        return self.codes - self.zero

    @property
    def value(self) -> Tensor:
        return self.centered.double() * self.scale

    def view(self, function: Callable[[Tensor], Tensor]) -> Integers:
        """The same with codes moved about."""
        return self._replace(codes=function(self.codes))


class Grid(NamedTuple):
    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def round(self, steps: Tensor) -> Integers:
        """Integers of what is given in steps of the grid."""
        assert steps.dtype == torch.float64
        exact = steps + self.zero
        if not bool((torch.frexp(self.scale).mantissa == 0.5).all()):
            assert not bool(self.is_tie(exact).any()), (
                "a number half-way between two integers: which of them floats take is left to their rounding errors, "
                "so that codes can't be compared; choose other data"
            )
        return self.take(exact)

    def take(self, exact: Tensor) -> Integers:
        """The nearest integers, of two the even one."""
        codes = torch.round(exact).clamp(self.low, self.high).long()
        return Integers(codes, self.scale, self.zero)

    def is_tie(self, exact: Tensor) -> Tensor:
        """Whether numbers are, as far as float64 can tell, half-way between two integers of the grid."""
        between = (exact > self.low) & (exact < self.high)
        return between & ((exact - exact.floor() - 0.5).abs() < 1e-9)


def grid_of(proxy: Any) -> Grid:
    with torch.no_grad():
        scale, zero, bits = proxy.scale().double(), proxy.zero_point(), int(proxy.bit_width())
    assert torch.equal(zero, zero.round())
    narrow = bool(proxy.is_narrow_range)
    if proxy.is_signed:
        return Grid(scale, zero.long(), narrow - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    return Grid(scale, zero.long(), 0, 2**bits - 1 - narrow)


def quantize(proxy: Any, x: Tensor) -> Integers:
    """The converter where floats come in; also for weights, once."""
    grid = grid_of(proxy)
    return grid.round(x.detach().double() / grid.scale)


def requantize(proxy: Any, *terms: Integers | Tensor) -> Integers:
    """The sum of terms, each scaled to the grid of a proxy; a tensor is a float constant."""
    grid = grid_of(proxy)
    steps: Any = 0.0
    for term in terms:
        if isinstance(term, Tensor):
            steps = steps + term.detach().double() / grid.scale
        else:
            steps = steps + term.centered.double() * (term.scale / grid.scale)
    return grid.round(steps)


def lookup(proxy: Any, function: Callable[[Tensor], Tensor], x: Integers) -> Integers:
    """A table of a function, from codes to codes."""
    entries, where = x.codes.unique(return_inverse=True)
    table = quantize(proxy, function(x._replace(codes=entries).value))
    return table.view(lambda codes: codes[where])


def multiply(a: Integers, b: Integers) -> Integers:
    return Integers(a.centered * b.centered, a.scale * b.scale)


def add(a: Integers, b: Integers) -> Integers:
    """A sum on one grid, of integers."""
    assert torch.equal(a.scale, b.scale)
    return Integers(a.centered + b.centered, a.scale)


def matmul(a: Integers, b: Integers) -> Integers:
    return Integers(a.centered @ b.centered, a.scale * b.scale)


def bias_on(scale: Tensor, bias: Tensor) -> Integers:
    """A bias of 32 bits on the grid of an accumulator."""
    codes = torch.round(bias.detach().double() / scale).clamp(-(2**31), 2**31 - 1)
    return Integers(codes.long(), scale)


def rows(weight: Integers) -> Integers:
    """A weight ``(out, in)`` as ``(in, out)``, scales of channels along the last axis."""
    return Integers(weight.codes.t(), weight.scale.reshape(-1).squeeze())


def linear(layer: Any, x: Integers) -> Integers:
    """The accumulator of a linear layer."""
    acc = matmul(x, rows(quantize(layer.weight_quant, layer.weight)))
    return acc if layer.bias is None else add(acc, bias_on(acc.scale, layer.bias))


def assert_same(result: Any, expected: Integers) -> None:
    """A quantized tensor holds the machine's integers, in the bits that it declares, on the machine's scale."""
    assert isinstance(result, IntQuantTensor) and result.is_valid
    assert bool((result.zero_point == expected.zero).all())
    codes = torch.round(result.value.double() / result.scale.double() + result.zero_point).long()
    assert torch.equal(codes, expected.codes)
    if result.value.dtype == torch.float64:
        torch.testing.assert_close(
            result.scale.expand_as(expected.value),
            expected.scale.expand_as(expected.value),
            rtol=1e-12,
            atol=0,
        )
    else:
        assert bool((result.scale == expected.scale).all())
    bits = float(result.bit_width)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if result.signed else (0, 2**bits - 1)
    assert low <= int(expected.codes.min()) and int(expected.codes.max()) <= high


def varied(x: Integers) -> bool:
    """Whether there is something to compare."""
    return x.codes.unique().numel() > 4


def settle(module: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Fix the scales, by the data and by the same less large, so that some of it is out of range."""
    module.eval()
    with calibration_mode(module), torch.no_grad():
        for factor in (1.0, 0.7):
            module(*(x * factor if x.is_floating_point() else x for x in inputs), **options)


def enlarge(module: nn.Module) -> None:
    """Larger weights and biases than a layer starts with, so that functions saturate and codes vary."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("weight", "bias")) and "quant" not in name:
                parameter.mul_(2)
