"""The fused functions as single passes over memory, compiled once and shared by all layers.

Used with ``qframework.settings.kernels = 'compiled'`` in eager mode, on other devices than CPUs and for what the C++ functions
(:mod:`qframework.functional.native`) don't take. torch's inductor compiles one version for each dtype, device,
granularity and rounding, whatever the sizes, and keeps it on disk. It is called directly, without the guards of
``torch.compile``, which take longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.functional.autograd import transforms_active
from qframework.functional.straight_through import ROUNDINGS


def wants_compiled(x: Tensor, scale: Tensor, *others: Tensor) -> bool:
    """Whether compiled functions should do the work for ``x``.

    Scales of one element, or one for each index of the first axis.
    """
    return (
        settings.kernels == "compiled"
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.is_contiguous()
        and (scale.numel() == 1 or _is_per_row(x, scale))
        and x.numel() > scale.numel()
        and not torch.compiler.is_compiling()
        and not transforms_active(*others)
        and not x.is_meta
    )


def _is_per_row(x: Tensor, scale: Tensor) -> bool:
    return scale.dim() == x.dim() and scale.shape[0] == scale.numel() == x.shape[0]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _quantize(x: Tensor, scale: Tensor, minimum: Tensor, maximum: Tensor, rounding: str) -> Tensor:
    q = ROUNDINGS[rounding](_wide(x) / scale)
    return (torch.clamp(q, minimum, maximum) * scale).to(x.dtype)


def _masked_gradient(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    low: Tensor,
    high: Tensor,
    rounding: str,
    rectify: bool,
) -> tuple[Tensor, Tensor]:
    exact = _wide(x) / scale
    rounded = ROUNDINGS[rounding](exact)
    place = exact if rectify else rounded
    inside = (place > low) & (place < high)
    error = torch.clamp(rounded, minimum, maximum) - torch.where(inside, exact, 0.0)
    total = (_wide(g) * error).sum(dim=-1, keepdim=scale.dim() > 0, dtype=torch.float64)
    return torch.where(inside, g, 0.0), total.to(scale.dtype)


def _scale_gradient(
    g: Tensor, x: Tensor, scale: Tensor, minimum: Tensor, maximum: Tensor, rounding: str
) -> Tensor:
    exact = _wide(x) / scale
    error = torch.clamp(ROUNDINGS[rounding](exact), minimum, maximum) - exact
    total = (_wide(g) * error).sum(dim=-1, keepdim=scale.dim() > 0, dtype=torch.float64)
    return total.to(scale.dtype)


def _largest_gradient(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    top: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    count = torch.where(x.abs() == top, 1.0, 0.0).sum()
    return _scale_gradient(g, x, scale, minimum, maximum, rounding), count


def _spread(g: Tensor, x: Tensor, top: Tensor, share: Tensor) -> Tensor:
    return torch.where(x.abs() == top, g + share * x.sign(), g).to(g.dtype)


def _compile(function: Callable[..., Any], kinds: str, dtype: torch.dtype, device: Any) -> Any:
    """Compile a function for operands of any size.

    Args:
        function: of tensors alone.
        kinds: a letter for each operand: ``x`` large, of ``dtype``; ``s`` a number, ``r`` a number for each row of ``x``.
        dtype: of the large operands; numbers are float32 beside half precision.
        device: of all.
    """
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    small = torch.float64 if dtype == torch.float64 else torch.float32
    rows = "r" in kinds
    with torch.inference_mode(False), torch.no_grad():
        made = {
            "x": torch.zeros((67, 71) if rows else (67,), dtype=dtype, device=device),
            "s": torch.zeros((), dtype=small, device=device),
            "r": torch.zeros((67, 1), dtype=small, device=device),
        }
        examples: list[Any] = [made[kind].clone() for kind in kinds]
        graph = make_fx(function, tracing_mode="symbolic")(*examples)
        return standalone_compile(graph, examples, dynamic_shapes="from_graph")


class RangeKernels:
    """The compiled functions of one range and rounding.

    Args:
        minimum, maximum: smallest and largest integer.
        low, high: between which the gradient passes.
        rounding: a name of :data:`~qframework.functional.ROUNDINGS`.
        rectify: the input goes through a ReLU first.
        rows: a scale for each index of the first axis.
        dtype, device: of the large tensors.
    """

    def __init__(
        self,
        minimum: float,
        maximum: float,
        low: float,
        high: float,
        rounding: str,
        rectify: bool,
        rows: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        small = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):
            self.minimum, self.maximum, self.low, self.high = (
                torch.tensor(b, dtype=small, device=device) for b in (minimum, maximum, low, high)
            )
        self.rows = rows
        kind = (rounding, rows, dtype, device)
        self._quantize = partial(_version, _quantize, "x?ss", *kind)
        self._masked = partial(_version, _masked_gradient, "xx?ssss", *kind, rectify=rectify)
        self._scale = partial(_version, _scale_gradient, "xx?ss", *kind)
        self._largest = partial(_version, _largest_gradient, "xx?sss", *kind)
        self._spread = partial(_version, _spread, "xxss", None, rows, dtype, device)

    def _shaped(self, x: Tensor) -> Tensor:
        return x.detach().reshape(x.shape[0], -1) if self.rows else x.detach().reshape(-1)

    def _scales(self, scale: Tensor) -> Tensor:
        return scale.detach().reshape((-1, 1) if self.rows else ())

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """``clamp(round(x / scale)) * scale`` in one pass."""
        operands = (self._shaped(x), self._scales(scale), self.minimum, self.maximum)
        y: Tensor = self._quantize()(*operands)
        return y.view(x.shape)

    def masked_gradient(self, g: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of input and scale where the range masks, in one pass."""
        operands = (self._shaped(g), self._shaped(x), self._scales(scale))
        bounds = (self.minimum, self.maximum, self.low, self.high)
        grad_x, total = self._masked()(*operands, *bounds)
        return grad_x.view(x.shape), total.view(scale.shape)

    def scale_gradient(self, g: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the scale where the range doesn't mask, in one pass."""
        operands = (self._shaped(g), self._shaped(x), self._scales(scale))
        total: Tensor = self._scale()(*operands, self.minimum, self.maximum)
        return total.view(scale.shape)

    def largest_gradient(
        self, g: Tensor, x: Tensor, scale: Tensor, top: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`scale_gradient`, and how many elements have the magnitude ``top``."""
        operands = (self._shaped(g), self._shaped(x), self._scales(scale), top.reshape(()))
        total, count = self._largest()(*operands, self.minimum, self.maximum)
        return total.view(scale.shape), count

    def spread(self, g: Tensor, x: Tensor, top: Tensor, share: Tensor) -> Tensor:
        """``g``, and ``share`` with the sign of the element at those of magnitude ``top``."""
        operands = (self._shaped(g), self._shaped(x), top.reshape(()), share.reshape(()))
        y: Tensor = self._spread()(*operands)
        return y.view(x.shape)


@lru_cache(maxsize=256)
def _version(
    function: Any,
    kinds: str,
    rounding: str | None,
    rows: bool,
    dtype: torch.dtype,
    device: torch.device,
    **static: Any,
) -> Any:
    if rounding is not None:
        static["rounding"] = rounding
    kinds = kinds.replace("?", "r" if rows else "s")
    return _compile(partial(function, **static), kinds, dtype, device)


range_kernels = lru_cache(maxsize=1024)(RangeKernels)
