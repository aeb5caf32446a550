"""The networks with a copy in place of each quantizer: what a quantizer that is called from Python can't be below.

Each quantization is one function of autograd's that reads its values once and writes as many (a ReLU where one is in front), and whose
gradient does the same. Layers save what was quantized and make the copy again in the backward pass, as bytes kept demand. Nothing is rounded,
no scale is computed or learned, nothing is checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from benchmarks.network import Network
from benchmarks.rows import FloatKit


def _copy(x: Tensor, relu: bool) -> Tensor:
    return torch.relu(x) if relu else x.clone()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.relu = relu
        return _copy(x, relu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if ctx.relu:
            return torch.ops.aten.threshold_backward(grad, x, 0), None
        return grad.clone(), None


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, how: Any) -> Tensor:
    if how is None:
        return F.linear(x, weight, bias)
    stride, padding, groups = how
    return torch.conv2d(x, weight, bias, stride, padding, 1, groups)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, made: Any, how: Any) -> Tensor:  # type: ignore[override]
        (origin, ctx.relu), parameter = made
        ctx.save_for_backward(origin, parameter)
        ctx.how = how
        return _compute(x, weight, bias, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        x = x if ctx.relu is None else _copy(x, ctx.relu)
        weight = weight.clone()
        needed = list(ctx.needs_input_grad[:3])
        if ctx.how is None:
            rows = grad.reshape(-1, grad.shape[-1])
            of_x = (rows @ weight).view(x.shape) if needed[0] else None
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
            return of_x, of_weight, rows.sum(0) if needed[2] else None, None, None
        stride, padding, groups = ctx.how
        arguments = (stride, padding, [1, 1], False, [0, 0], groups, needed)
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments)
        return *found, None, None


def copied(x: Tensor, relu: bool = False) -> Tensor:
    """A copy of ``x``, or of ``relu(x)``, which knows what it was made of."""
    if not torch.is_grad_enabled():
        return _copy(x, relu)
    y: Tensor = super(Function, _Copy).apply(x, relu)  # type: ignore[misc]
    y.origin = (x, relu)  # type: ignore[attr-defined]
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, made: Any, how: Any = None) -> Any:
    if not torch.is_grad_enabled():
        return _compute(x, weight, bias, how)
    return super(Function, _Product).apply(x, weight, bias, made, how)  # type: ignore[misc]


def _made_of(x: Any) -> tuple[Tensor, bool | None]:
    return getattr(x, "origin", (x, None))  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A linear layer that copies its weight, and its input and its bias where it is told to."""

    copies_input = True
    copies_bias = False
    copies_parameters = True

    def forward(self, x: Any) -> Any:
        """As torch's."""
        x = copied(x) if self.copies_input else x
        weight = copied(self.weight) if self.copies_parameters else self.weight
        bias = copied(self.bias) if self.copies_parameters and self.copies_bias else self.bias
        return _product(x, weight, bias, (_made_of(x), self.weight))


class Conv(nn.Conv2d):
    """A convolution that copies its weight, and its input where it is told to."""

    copies_input = False
    copies_parameters = True

    def forward(self, x: Any) -> Any:
        """As torch's."""
        x = copied(x) if self.copies_input else x
        weight = copied(self.weight) if self.copies_parameters else self.weight
        how = (self.stride, self.padding, self.groups)
        return _product(x, weight, None, (_made_of(x), self.weight), how)


class ReLU(nn.Module):
    """A ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch's."""
        return copied(x, relu=True)


class _Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return copied(x) + copied(y)


class _Encoder(nn.Module):
    """A transformer encoder layer of 256 features, 4 heads, 1024 hidden ones."""

    def __init__(self) -> None:
        super().__init__()
        self.projections, self.out = Linear(256, 768), Linear(256, 256)
        self.first, self.second = Linear(256, 1024), Linear(1024, 256)
        for layer in (self.projections, self.out, self.first, self.second):
            layer.copies_bias = True
        self.norm1, self.norm2 = nn.LayerNorm(256), nn.LayerNorm(256)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, features = x.shape
        heads = self.projections(x).view(batch, steps, 3, 4, 64).permute(2, 0, 3, 1, 4)
        query, key, value = (heads[0] * 0.125), heads[1].transpose(-2, -1), heads[2]
        weights = (copied(query) @ copied(key)).softmax(-1)
        seen = (copied(weights) @ copied(value)).transpose(1, 2).reshape(batch, steps, features)
        x = self.norm1(x + self.out(seen))
        return self.norm2(x + self.second(torch.relu(self.first(x))))  # type: ignore[no-any-return]


class CopyingKit(FloatKit):
    """Layers that copy what a quantized network would quantize."""

    def __init__(self) -> None:
        self._stem = True

    def conv(self, i: int, o: int, size: int, kind: str, **how: Any) -> nn.Module:
        """A convolution without bias."""
        layer = Conv(i, o, size, bias=False, **how)
        layer.copies_input, self._stem = kind == "small" and self._stem, False
        return layer

    def relu(self, kind: str) -> nn.Module:
        """A ReLU."""
        return ReLU()

    def linear(self, i: int, o: int, kind: str) -> nn.Module:
        """A linear layer."""
        layer = Linear(i, o)
        layer.copies_input = kind not in ("weights4", "small")
        return layer

    def encoder(self) -> nn.Module:
        """A transformer encoder layer."""
        return _Encoder()

    def add(self, kind: str) -> nn.Module:
        """A sum."""
        return _Sum()


def freeze(model: nn.Module) -> None:
    """Let no parameter be copied any more."""
    for module in model.modules():
        if isinstance(module, (Linear, Conv)):
            module.copies_parameters = False


def network() -> Network:
    """The network of :mod:`benchmarks.network`."""

    def head(i: int, o: int) -> Linear:
        layer = Linear(i, o)
        layer.copies_input = False
        return layer

    return Network(Conv, ReLU, head)
