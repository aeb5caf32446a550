"""What the parts of a quantizer are called with, for those who write one: any module that is called so will do."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Scaling(Protocol):
    """A scale: positive, of a shape that broadcasts to what is quantized.

    An attribute ``depends_on_input``, where there is one, says whether the scale depends on the input of the present call; without
    it, it is taken to do so.
    """

    def __call__(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for ``x`` and a threshold.

        Args:
            x: what is quantized.
            threshold: the number of steps that the magnitude is mapped to, 0-dim; 1 where None.
        """


class ZeroPoint(Protocol):
    """A zero point, in integer steps, of a shape that broadcasts to what is quantized.

    Attributes that it may have: ``symmetric`` (it is 0 always) and ``depends_on_input``, see :class:`Scaling`.
    """

    def __call__(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """The zero point for ``x``.

        Args:
            x: what is quantized.
            scale: of ``x``.
            bit_width: 0-dim.
        """


class BitWidth(Protocol):
    """A width in bits, 0-dim."""

    def __call__(self) -> Tensor:
        """The present width."""


class TensorQuantizer(Protocol):
    """A quantizer of a whole tensor.

    An integer quantizer gives values, scale, zero point and bit width; those of other formats give more, see their proxies.
    """

    def __call__(self, x: Tensor) -> tuple[Any, ...]:
        """The dequantized values of ``x`` in its shape and dtype, and what describes them."""
