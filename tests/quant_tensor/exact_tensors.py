"""Quantized tensors of known integers."""

import torch

from qframework.quant_tensor import IntQuantTensor


def make(
    shape: tuple[int, ...],
    bits: int = 8,
    signed: bool = True,
    scale: torch.Tensor | float = 0.125,
    zero: float = 0.0,
    seed: int = 0,
) -> IntQuantTensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    q = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return IntQuantTensor((q - zero) * scale, scale, zero, float(bits), signed)


def integers(q: IntQuantTensor) -> torch.Tensor:
    assert q.is_valid
    return q.int().double()


def per_channel(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return (2.0 ** -torch.arange(1, shape[axis] + 1)).reshape(size)
