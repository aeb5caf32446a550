"""Numbers in float64 with a bound on what rounding in a shorter format may have made of them.

A running error analysis: every function adds its own rounding errors to those that its arguments bring (Higham, "Accuracy and
Stability of Numerical Algorithms", chapter 3). With ``u`` the unit roundoff (2^-24 in float32), a sum of ``n`` products, in any
order, is off by at most ``(2 n + 8) u`` times the sum of their magnitudes; sums, products and quotients of two by ``u``; functions
such as exp or tanh by ``16 u`` times the larger of 1, argument and result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Bounded:
    """A number and how far another computation of it may be off; float64 tensors of one shape."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude."""
        return self.value.abs() + self.error


def exact(x: Any) -> Any:
    """A float tensor as a number without an error."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))
    return x


def _both(a: Any, b: Any) -> tuple[Bounded, Bounded]:
    def made(x: Any, like: Bounded) -> Bounded:
        if isinstance(x, Bounded):
            return x
        t = torch.as_tensor(x, dtype=torch.float64)
        return Bounded(t, torch.zeros_like(t))

    like = a if isinstance(a, Bounded) else b
    return made(a, like), made(b, like)


def rounded(value: Tensor, error: Tensor, u: float) -> Bounded:
    """A result that is rounded once."""
    return Bounded(value, error + u * value.abs())


def add(u: float, a: Any, b: Any, *, alpha: float = 1) -> Bounded:
    """``a + alpha b``."""
    a, b = _both(a, b)
    return rounded(a.value + alpha * b.value, a.error + abs(alpha) * b.error, u)


def subtract(u: float, a: Any, b: Any, *, alpha: float = 1) -> Bounded:
    """``a - alpha b``."""
    return add(u, a, b, alpha=-alpha)


def reversed_subtract(u: float, a: Any, b: Any, *, alpha: float = 1) -> Bounded:
    """``b - a``."""
    return add(u, b, a, alpha=-alpha)


def product(u: float, a: Any, b: Any) -> Bounded:
    """``a b``."""
    a, b = _both(a, b)
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return rounded(a.value * b.value, error, u)


def quotient(u: float, a: Any, b: Any, *, rounding_mode: str | None = None) -> Bounded:
    """``a / b``."""
    a, b = _both(a, b)
    value = torch.div(a.value, b.value, rounding_mode=rounding_mode)
    error = (a.error + value.abs() * b.error) / (b.value.abs() - b.error).clamp_min(1e-300)
    return rounded(value, error + (rounding_mode is not None), u)


def bilinear(
    u: float, function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any, count: int
) -> Bounded:
    """Sums of ``count`` products."""
    a, b = _both(a, b)
    value = function(a.value, b.value)
    error = (2 * count + 8) * u * function(a.value.abs(), b.value.abs())
    if bool(b.error.any()):
        error = error + function(a.size, b.error)
    if bool(a.error.any()):
        error = error + function(a.error, b.value.abs())
    return Bounded(value, error.abs())


def linear(u: float, x: Any, w: Any, bias: Any = None) -> Bounded:
    """``x @ w.T + bias``."""
    made = bilinear(u, F.linear, x, w, w.value.shape[-1])
    return made if bias is None else add(u, made, bias)


def matmul(u: float, a: Any, b: Any) -> Bounded:
    """``a @ b``."""
    return bilinear(u, torch.matmul, a, b, a.value.shape[-1])


def addmm(u: float, start: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Bounded:
    """``beta start + alpha a @ b``."""
    return add(u, product(0.0, start, float(beta)), product(0.0, matmul(u, a, b), float(alpha)))


def convolution(name: str) -> Callable[..., Bounded]:
    """A convolution or transposed one."""
    function = getattr(F, name)
    transposed, spatial = "transpose" in name, int(name[-2])

    def apply(u: float, x: Any, w: Any, bias: Any = None, *how: Any, **options: Any) -> Bounded:
        count = w.value[0].numel() * (w.value.shape[0] if transposed else 1)
        made = bilinear(u, lambda a, b: function(a, b, None, *how, **options), x, w, count)
        if bias is None:
            return made
        shape = (-1,) + (1,) * spatial
        bias = Bounded(bias.value.reshape(shape), bias.error.reshape(shape))
        return add(u, made, bias)

    return apply


def reduced(function: Callable[..., Tensor]) -> Callable[..., Bounded]:
    """Sums or means of elements."""

    def apply(u: float, x: Any, *how: Any, **options: Any) -> Bounded:
        options.pop("dtype", None)
        value = function(x.value, *how, **options)
        count = max(x.value.numel() // max(value.numel(), 1), 1)
        size, error = (function(t, *how, **options) for t in (x.size, x.error))
        return Bounded(value, error + (2 * count + 8) * u * size)

    return apply


def elementwise(function: Callable[..., Tensor], units: float = 16.0) -> Callable[..., Bounded]:
    """A function of elements: what its argument's error makes of it, and its own."""

    def apply(u: float, x: Any, *how: Any, **options: Any) -> Bounded:
        how = tuple(a.value if isinstance(a, Bounded) else a for a in how)
        value = function(x.value, *how, **options)
        up, down = (function(x.value + s * x.error, *how, **options) for s in (1, -1))
        spread = torch.maximum((up - value).abs(), (down - value).abs())
        size = value.abs().clamp_min(1.0)
        if value.shape == x.value.shape:
            size = torch.maximum(size, x.value.abs())
        return Bounded(value, (spread + units * u * size).nan_to_num(0.0, 0.0, 0.0))

    return apply


def softmax(u: float, x: Any, dim: int, *more: Any, **options: Any) -> Bounded:
    """``exp(x) / sum(exp(x))``."""
    value = torch.softmax(x.value, dim)
    finite = torch.where(x.value.isinf(), 0.0, x.error)
    relative = 2 * finite.amax(dim, keepdim=True) * 1.1 + (x.value.shape[dim] + 32) * u
    return Bounded(value.nan_to_num(0.0), value.nan_to_num(0.0) * relative + u * 2.0**-16)


def log_softmax(u: float, x: Any, dim: int, *more: Any, **options: Any) -> Bounded:
    """``x - log(sum(exp(x)))``."""
    value = torch.log_softmax(x.value, dim)
    size = x.value.abs().amax(dim, keepdim=True) + 1
    error = 2 * x.error.amax(dim, keepdim=True) + (x.value.shape[dim] + 32) * u * size
    return Bounded(value, error + u * value.abs())


def _normalized(u: float, x: Bounded, dims: list[int], eps: float, centered: bool) -> Bounded:
    """``(x - mean) / sqrt(variance + eps)`` over some axes; without the mean for the root mean square."""
    count = 1
    for d in dims:
        count *= x.value.shape[d]
    g = (2 * count + 16) * u
    v, e = x.value, x.error
    square = (v * v).mean(dims, keepdim=True)
    if centered:
        mean = v.mean(dims, keepdim=True)
        mean_error = e.mean(dims, keepdim=True) + g * v.abs().mean(dims, keepdim=True)
    else:
        mean = mean_error = torch.zeros_like(square)
    c, ce = v - mean, e + mean_error + u * (v.abs() + mean.abs())
    variance = (c * c).mean(dims, keepdim=True)
    # also where it is computed as the mean square less the square of the mean
    variance_error = (2 * c.abs() * ce + ce * ce).mean(dims, keepdim=True)
    variance_error = variance_error + g * (square + mean * mean)
    r = (variance + eps).rsqrt()
    r_error = 0.5 * variance_error * (variance + eps - variance_error).clamp_min(1e-12) ** -1.5
    r_error = r_error + 8 * u * r
    return Bounded(c * r, ce * (r + r_error) + c.abs() * r_error + 4 * u * (c * r).abs())


def _affine(u: float, y: Bounded, weight: Any, bias: Any, shape: tuple[int, ...]) -> Bounded:
    def shaped(t: Any) -> Bounded:
        return Bounded(t.value.reshape(shape), t.error.reshape(shape))

    y = y if weight is None else product(2 * u, y, shaped(weight))
    return y if bias is None else add(2 * u, y, shaped(bias))


def layer_norm(
    u: float, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Bounded:
    """Over the last axes."""
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    return _affine(u, _normalized(u, x, dims, eps, True), weight, bias, tuple(shape))


def rms_norm(u: float, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Bounded:
    """Over the last axes, without the mean."""
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    least = 2 * u if eps is None else eps  # torch takes that of the dtype
    return _affine(u, _normalized(u, x, dims, least, False), weight, None, tuple(shape))


def group_norm(
    u: float, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Bounded:
    """Over groups of channels."""
    whole = x.value.shape
    split = (whole[0], groups, -1)
    parts = Bounded(x.value.reshape(split), x.error.reshape(split))
    y = _normalized(u, parts, [2], eps, True)
    y = Bounded(y.value.reshape(whole), y.error.reshape(whole))
    return _affine(u, y, weight, bias, (1, -1) + (1,) * (len(whole) - 2))


def batch_norm(
    u: float, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *how: Any
) -> Bounded:
    """By running statistics."""
    eps = next(h for h in reversed(how) if isinstance(h, float))
    shape = (1, -1) + (1,) * (x.value.dim() - 2)
    deviation = Bounded((variance.value + eps).sqrt(), 4 * u * (variance.value + eps).sqrt())
    factor = quotient(
        u, exact(torch.ones_like(mean.value)) if weight is None else weight, deviation
    )
    y = subtract(2 * u, x, Bounded(mean.value.reshape(shape), mean.error.reshape(shape)))
    return _affine(u, y, factor, bias, shape)


def attention(
    u: float,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Bounded:
    """``scaled_dot_product_attention`` without dropout."""
    scale = options.get("scale") or q.value.shape[-1] ** -0.5
    scores = matmul(u, q, Bounded(k.value.transpose(-2, -1), k.error.transpose(-2, -1)))
    scores = product(u, scores, scale)
    if causal:
        seen = torch.ones(scores.value.shape[-2:], dtype=torch.bool).tril()
        scores = Bounded(scores.value.masked_fill(~seen, -torch.inf), scores.error)
    elif isinstance(mask, Tensor):
        scores = Bounded(scores.value.masked_fill(~mask, -torch.inf), scores.error)
    elif mask is not None:
        scores = add(u, scores, mask)
    return matmul(u, softmax(u, scores, -1), v)


def select(u: float, condition: Any, a: Any, b: Any) -> Bounded:
    """``where(condition, a, b)``."""
    a, b = _both(a, b)
    return Bounded(
        torch.where(condition, a.value, b.value), torch.where(condition, a.error, b.error)
    )


def filled(u: float, x: Any, mask: Tensor, value: Any) -> Bounded:
    """``masked_fill``."""
    number = value.value if isinstance(value, Bounded) else value
    return Bounded(x.value.masked_fill(mask, number), x.error.masked_fill(mask, 0.0))


#: By the name of the function; each is called with the unit roundoff first.
RULES: dict[str, Callable[..., Bounded]] = {
    "add": add,
    "add_": add,
    "sub": subtract,
    "rsub": reversed_subtract,
    "mul": product,
    "mul_": product,
    "div": quotient,
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "addmm": addmm,
    "sum": reduced(torch.sum),
    "mean": reduced(torch.mean),
    "avg_pool1d": reduced(F.avg_pool1d),
    "avg_pool2d": reduced(F.avg_pool2d),
    "avg_pool3d": reduced(F.avg_pool3d),
    "adaptive_avg_pool1d": reduced(F.adaptive_avg_pool1d),
    "adaptive_avg_pool2d": reduced(F.adaptive_avg_pool2d),
    "softmax": softmax,
    "_softmax": softmax,
    "log_softmax": log_softmax,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "scaled_dot_product_attention": attention,
    "where": select,
    "masked_fill": filled,
    "relu": elementwise(torch.relu, 0.0),
    "relu_": elementwise(torch.relu, 0.0),
    "neg": elementwise(torch.neg, 0.0),
    "abs": elementwise(torch.abs, 0.0),
    "round": elementwise(torch.round, 0.0),
}
for _n in (1, 2, 3):
    for _name in (f"conv{_n}d", f"conv_transpose{_n}d"):
        RULES[_name] = convolution(_name)
