"""Rotations of the channels between layers, fixed or learned, and the modules that hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qframework.graph.channel_factors import follow_weights, weight_of
from qframework.graph.hadamard import get_hadK, matmul_hadU
from qframework.graph.layer_view import LayerView
from qframework.quant_tensor import dequantize


class Rotation(nn.Module):
    """An orthogonal matrix, shared by the weights that it turns; to be learned by :class:`~qframework.graph.optim.CaileySGD`.

    Args:
        matrix: ``(n, n)``, orthogonal.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self) -> Tensor:
        """The matrix."""
        return self.matrix


class RotatedRows(nn.Module):
    """Parametrization of a weight ``(out, in)`` or a bias ``(out,)``: what is written is turned, ``y Q``.

    Args:
        rotation: ``Q``.
        last: turn the last axis, as that of an embedding's weight.
    """

    def __init__(self, rotation: Rotation, last: bool = False) -> None:
        super().__init__()
        self.rotation, self.last = rotation, last

    def forward(self, weight: Tensor) -> Tensor:
        """The turned weight."""
        matrix: Tensor = self.rotation().to(weight.dtype)
        return weight @ matrix if self.last or weight.dim() == 1 else matrix.t() @ weight


class RotatedColumns(nn.Module):
    """Parametrization of a weight ``(out, in)`` that reads turned inputs, ``W Q``.

    Args:
        rotation: ``Q``.
        last: turn the first axis instead, for a weight ``(in, out)``.
    """

    def __init__(self, rotation: Rotation, last: bool = False) -> None:
        super().__init__()
        self.rotation, self.last = rotation, last

    def forward(self, weight: Tensor) -> Tensor:
        """The turned weight."""
        matrix: Tensor = self.rotation().to(weight.dtype)
        return matrix.t() @ weight if self.last else weight @ matrix


class RotatedInput(nn.Module):
    """A layer whose input is turned by a Hadamard matrix when it is called.

    Args:
        layer: a linear layer; its weight is turned likewise, so that the result stays.
        block_size: turn blocks of so many channels; None for all at once.
        size: number of channels after zeros were added behind them; None for none.

    Raises:
        NoHadamardError: no matrix of that size is known.
    """

    base: Tensor | None

    def __init__(
        self, layer: nn.Module, block_size: int | None = None, size: int | None = None
    ) -> None:
        super().__init__()
        held: Any = layer
        self.size = size or held.in_features
        self.added = self.size - held.in_features
        self.block_size = block_size or self.size
        if self.size % self.block_size:
            raise ValueError(
                f"rotation_block_size={self.block_size} doesn't divide the {self.size} input channels"
            )
        base, _ = get_hadK(self.block_size)
        self.register_buffer("base", base, persistent=False)
        owner, name = _where(held)
        with torch.no_grad():
            weight: Any = owner._parameters[name]
            wide = torch.nn.functional.pad(weight.detach(), (0, self.added))
            turned = self.turned(wide.to(torch.float64)).to(weight.dtype)
            setattr(owner, name, nn.Parameter(turned, requires_grad=weight.requires_grad))
            held.in_features = self.size
        follow_weights(layer)
        self.layer = layer

    def turned(self, x: Tensor) -> Tensor:
        """``x`` times the matrix along its last axis."""
        blocks = x.unflatten(-1, (-1, self.block_size))
        return matmul_hadU(blocks, base=self.base).flatten(-2)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer of the turned input."""
        x = dequantize(input)
        if self.added:
            x = torch.nn.functional.pad(x, (0, self.added))
        return self.layer(self.turned(x), *args, **kwargs)


def _where(layer: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the weight whose columns are to be turned, and its name there.

    Raises:
        ValueError: the weight is computed otherwise than by turning rows, which turning columns doesn't concern.
    """
    if "weight" in layer._parameters:
        return layer, "weight"
    if not parametrize.is_parametrized(layer, "weight"):
        raise ValueError("its weight is computed at each call")
    held: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if not all(isinstance(p, RotatedRows) for p in held):
        raise ValueError("its weight is computed at each call")
    return held, "original"


class TurnedInput(nn.Module):
    """The input turned by a Hadamard matrix along its last axis.

    Args:
        size: number of channels.
        block_size: turn blocks of so many; None for all at once.

    Raises:
        NoHadamardError: no matrix of that size is known.
        ValueError: blocks that don't divide the channels.
    """

    base: Tensor | None

    def __init__(self, size: int, block_size: int | None = None) -> None:
        super().__init__()
        self.block_size = block_size or size
        if size % self.block_size:
            raise ValueError(
                f"rotation_block_size={self.block_size} doesn't divide the {size} input channels"
            )
        self.register_buffer("base", get_hadK(self.block_size)[0], persistent=False)

    def forward(self, input: Any) -> Tensor:
        """``input`` times the matrix."""
        blocks = dequantize(input).unflatten(-1, (-1, self.block_size))
        return matmul_hadU(blocks, base=self.base).flatten(-2)


# ------------------------------------------------------------ turning weights


@torch.no_grad()
def turn_columns(layer: Any, turn: TurnedInput) -> None:
    """Let a layer read what a module turns, and give what it did without."""
    weight = weight_of(layer)
    weight.copy_(turn.to(weight.device)(weight.to(torch.float64)))
    follow_weights(layer)


@torch.no_grad()
def rotate_rows(layer: Any, matrix: Tensor) -> None:
    """Turn what a layer writes: ``y Q``."""
    weight = weight_of(layer)
    wide = matrix.to(weight.device, torch.float64)
    if isinstance(layer, nn.Embedding):
        weight.copy_(weight.to(torch.float64) @ wide)
        return
    view = LayerView(layer)
    weights = view.to_matrix(weight).to(torch.float64) @ wide
    weight.copy_(view.from_matrix(weights))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.to(torch.float64) @ wide)
    follow_weights(layer)


@torch.no_grad()
def rotate_columns(layer: Any, matrix: Tensor) -> None:
    """Let a layer read ``x Q`` and give what it did for ``x``."""
    weight = weight_of(layer)
    wide = matrix.to(weight.device, torch.float64)
    view = LayerView(layer)
    weights = wide.t() @ view.to_matrix(weight).to(torch.float64)
    weight.copy_(view.from_matrix(weights))
    follow_weights(layer)


def extract_trainable_rotation_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of all rotations of a model, each once."""
    return [m.matrix for m in model.modules() if isinstance(m, Rotation)]


def fuse_parametrizations(model: nn.Module) -> nn.Module:
    """Let parametrized weights be what they are now, and take the parametrizations off.

    Args:
        model: changed in place.

    Returns:
        The same module.
    """
    for module in list(model.modules()):
        held: Any = getattr(module, "parametrizations", None)
        if held is not None and parametrize.is_parametrized(module):
            for name in list(held):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            follow_weights(module)
    return model
