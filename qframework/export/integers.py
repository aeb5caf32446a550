"""Integers with a scale, and what functions make of them: exact products and sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Whole numbers up to here are all numbers of float64.
_EXACT = 2.0**53


@dataclass(frozen=True, eq=False)
class Integers:
    """``(codes - zero) * scale``.

    Attributes:
        codes: int64.
        scale: float64, broadcasts to the codes.
        zero: int64, broadcasts likewise.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def centered(self) -> Tensor:
        """Codes less the zero point."""
        return self.codes - self.zero

    @property
    def value(self) -> Tensor:
        """What they stand for, in float64."""
        return self.centered.double() * self.scale

    @property
    def one_scale(self) -> bool:
        """Whether one scale and zero point hold for all."""
        return self.scale.numel() == 1 and self.zero.numel() == 1

    @property
    def single(self) -> Tensor:
        """The one scale, without axes."""
        return self.scale.reshape(())


def of_sums(codes: Tensor, scale: Tensor) -> Integers:
    """Integers without a zero point."""
    return Integers(codes, scale, torch.zeros((), dtype=torch.int64, device=codes.device))


def whole(x: Tensor) -> Tensor:
    """Exact whole numbers of float64 as int64."""
    return x.round().long()


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def multiply(
    function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, products: int
) -> Tensor:
    """Sums of products of int64, by a function of float64 where that is exact.

    Args:
        function: computes them.
        a: integers.
        b: integers.
        products: in one sum, at most.

    Raises:
        OverflowError: sums don't fit into 53 bits.
    """
    if _largest(a) * _largest(b) * max(products, 1) >= _EXACT:
        raise OverflowError("a sum of products needs more than 53 bits")
    return whole(function(a.double(), b.double()))


def same_scale(a: Integers, b: Integers) -> bool:
    """Whether two scales are one, but for the rounding error of a float32 product."""
    try:
        return bool(torch.isclose(a.scale, b.scale, rtol=1e-6, atol=0.0).all())
    except RuntimeError:
        return False


def _along_last(
    scale: Tensor, axis: int, rank: int, result_axis: int, out_rank: int
) -> Tensor | None:
    """A scale along one axis of a weight as one along an axis of the result; None along another axis."""
    if scale.numel() == 1:
        return scale.reshape(())
    shape = (1,) * (rank - scale.dim()) + tuple(scale.shape)
    if any(n != 1 for i, n in enumerate(shape) if i != axis % rank):
        return None
    out = [1] * out_rank
    out[result_axis] = scale.numel()
    return scale.reshape(out)


def _with_bias(acc: Integers, bias: Any, axis: int) -> Any:
    """An accumulator and a bias: integers on its scale, else float64."""
    if bias is None:
        return acc
    shape = [1] * acc.codes.dim()
    shape[axis] = -1
    if isinstance(bias, Integers):
        spread = bias.scale.reshape(-1).expand(bias.codes.numel()).reshape(shape)
        moved = of_sums(bias.centered.reshape(shape), spread)
        if same_scale(acc, moved):
            return of_sums(acc.codes + moved.codes, acc.scale)
        return acc.value + moved.value
    return acc.value + bias.double().reshape(shape)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``."""
    if not (isinstance(x, Integers) and isinstance(weight, Integers)) or not x.one_scale:
        return NotImplemented
    rank = x.codes.dim()
    scale = _along_last(weight.scale, 0, 2, rank - 1, rank)
    if scale is None:
        return NotImplemented
    function = torch.nn.functional.linear
    codes = multiply(function, x.centered, weight.centered, weight.codes.shape[-1])
    return _with_bias(of_sums(codes, x.single * scale), bias, -1)


def matmul(a: Any, b: Any) -> Any:
    """``a @ b``."""
    if not (isinstance(a, Integers) and isinstance(b, Integers)) or not a.one_scale:
        return NotImplemented
    rank = b.codes.dim()
    out_rank = max(rank, a.codes.dim())
    scale = _along_last(b.scale, rank - 1, rank, out_rank - 1, out_rank)
    if scale is None or b.zero.numel() > 1:
        return NotImplemented
    codes = multiply(torch.matmul, a.centered, b.centered, a.codes.shape[-1])
    return of_sums(codes, a.single * scale)


def addmm(start: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """``start + a @ b``."""
    product = matmul(a, b)
    if product is NotImplemented or beta != 1 or alpha != 1:
        return NotImplemented
    if isinstance(start, Integers) and start.codes.dim() == 1:
        return _with_bias(product, start, -1)
    return add(product, start)


def _convolution(transposed: bool, name: str) -> Callable[..., Any]:
    function = getattr(torch.nn.functional, name)
    spatial = int(name[-2])

    def apply(x: Any, weight: Any, bias: Any = None, *how: Any, **options: Any) -> Any:
        if not (isinstance(x, Integers) and isinstance(weight, Integers)):
            return NotImplemented
        rank, axis = weight.codes.dim(), x.codes.dim() - spatial - 1
        out_rank = x.codes.dim()
        names: tuple[str, ...]
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        names = names if transposed else ("stride", "padding", "dilation", "groups")
        given = dict(zip(names, how, strict=False)) | options
        groups = int(given.get("groups", 1))
        scale = _along_last(weight.scale, int(transposed), rank, axis, out_rank)
        if scale is None or (transposed and groups > 1 and scale.numel() > 1):
            if scale is None or groups == 1:
                return NotImplemented
            repeats = [1] * out_rank
            repeats[axis] = groups
            scale = scale.repeat(repeats)
        if x.one_scale:
            scale = x.single * scale
        elif not transposed and weight.codes.shape[1] == 1 and x.zero.numel() == 1:
            own = _along_last(x.scale, axis, out_rank, axis, out_rank)
            if own is None:
                return NotImplemented
            scale = own.repeat_interleave(weight.codes.shape[0] // groups, dim=axis) * scale
        else:
            return NotImplemented
        products = weight.codes[0].numel() * (weight.codes.shape[0] if transposed else 1)
        codes = multiply(
            lambda a, b: function(a, b, None, **given), x.centered, weight.centered, products
        )
        return _with_bias(of_sums(codes, scale), bias, axis)

    return apply


def add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    """``a + b``; integers on one scale."""
    return _sum(a, b, alpha)


def subtract(a: Any, b: Any, *, alpha: float = 1) -> Any:
    """``a - b``; integers on one scale."""
    return _sum(a, b, -alpha)


def _sum(a: Any, b: Any, factor: float) -> Any:
    if not (isinstance(a, Integers) and isinstance(b, Integers)) or factor not in (1, -1):
        return NotImplemented
    if not same_scale(a, b):
        return NotImplemented
    return of_sums(a.centered + int(factor) * b.centered, a.scale)


def product(a: Any, b: Any) -> Any:
    """``a * b``, by elements; a number goes to the scale."""
    if isinstance(a, Integers) and isinstance(b, Integers):
        if _largest(a.centered) * _largest(b.centered) >= 2.0**62:
            return NotImplemented
        return of_sums(a.centered * b.centered, a.scale * b.scale)
    if isinstance(b, Integers):
        a, b = b, a
    if isinstance(b, (int, float)) and not isinstance(b, bool) and b > 0:
        return Integers(a.codes, a.scale * b, a.zero)
    return NotImplemented


def quotient(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    """``a / b`` for a number ``b``, which goes to the scale."""
    if rounding_mode is None and isinstance(a, Integers) and isinstance(b, (int, float)) and b > 0:
        return Integers(a.codes, a.scale / b, a.zero)
    return NotImplemented


def negative(a: Any) -> Any:
    """``-a``."""
    return of_sums(-a.centered, a.scale)


def relu(a: Any) -> Any:
    """``max(a, 0)``: no code below the zero point."""
    return Integers(torch.maximum(a.codes, a.zero), a.scale, a.zero)


def average_pool(name: str) -> Callable[..., Any]:
    """Sums over windows, on the scale divided by their size; windows that are cut have another divisor."""
    function = getattr(torch.nn.functional, name)
    spatial = int(name[-2])

    def apply(x: Any, *how: Any, **options: Any) -> Any:
        if x.scale.numel() > 1 and any(n > 1 for n in x.scale.shape[-spatial:]):
            return NotImplemented
        ones = torch.ones_like(
            x.codes[..., :1, :1] if spatial == 2 else x.codes, dtype=torch.float64
        )
        ones = ones.expand(x.codes.shape)
        means = function(x.centered.double(), *how, **options)
        share = function(ones, *how, **options)
        pooled = tuple(x.codes.shape[-spatial:])
        if bool((share != 1).any()):
            return NotImplemented
        sizes = _window(name, pooled, tuple(means.shape[-spatial:]), how, options)
        if sizes is None:
            return NotImplemented
        area = 1
        for n in sizes:
            area *= n
        sums = means * area
        if bool(((sums - sums.round()).abs() > 1e-6).any()):
            return NotImplemented
        return of_sums(whole(sums), x.scale / area)

    return apply


def _window(
    name: str, before: tuple[int, ...], after: tuple[int, ...], how: tuple[Any, ...], options: Any
) -> list[int] | None:
    """The sizes of windows that are all alike; None where they aren't."""
    if name.startswith("adaptive"):
        if any(n % m for n, m in zip(before, after, strict=True)):
            return None
        return [n // m for n, m in zip(before, after, strict=True)]
    size = how[0] if how else options["kernel_size"]
    override = how[5] if len(how) > 5 else options.get("divisor_override")
    if override is not None:
        return [int(override)]
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * len(before) if len(sizes) == 1 else sizes


def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The mean along axes: a sum, on the scale divided by their size."""
    if not x.one_scale:
        return NotImplemented
    codes = x.centered
    total = codes.sum() if dim is None else codes.sum(dim, keepdim)
    return of_sums(total, x.single / (codes.numel() // max(total.numel(), 1)))


def summed(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The sum along axes."""
    if not x.one_scale:
        return NotImplemented
    codes = x.centered
    return of_sums(codes.sum() if dim is None else codes.sum(dim, keepdim), x.single)


#: Functions of integers, by name.
EXACT: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "addmm": addmm,
    "add": add,
    "add_": add,
    "sub": subtract,
    "mul": product,
    "mul_": product,
    "div": quotient,
    "neg": negative,
    "relu": relu,
    "relu_": relu,
    "mean": mean,
    "sum": summed,
    "avg_pool1d": average_pool("avg_pool1d"),
    "avg_pool2d": average_pool("avg_pool2d"),
    "adaptive_avg_pool2d": average_pool("adaptive_avg_pool2d"),
}
for _n in (1, 2, 3):
    EXACT[f"conv{_n}d"] = _convolution(False, f"conv{_n}d")
    EXACT[f"conv_transpose{_n}d"] = _convolution(True, f"conv_transpose{_n}d")
EXACT["conv_transpose2d.input"] = EXACT["conv_transpose2d"]
