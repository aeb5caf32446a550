"""Making quantized values again in the backward pass instead of saving them.

A quantizer saves its input for the backward pass, and the layer behind it would save the quantized values, too. But these are
``quantize(input)``, one pass over memory where C++ functions compute: such layers save the quantizer's input, which is saved
anyway, and of a weight is the parameter. Quantized values know what they were made of by an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Parameter

from qframework.configuration import settings
from qframework.kernels import native
from qframework.kernels.autograd import Fused, is_compiling, is_grad_enabled, may_fuse
from qframework.kernels.native import tensors
from qframework.kernels.rounding import quantize_as
from qframework.quant_tensor import QuantTensor

#: Weights of fewer elements are saved: to make them again costs more than their memory. Those of convolutions are small beside what
#: these are applied to.
LARGE, LARGE_KERNELS = 1 << 16, 1 << 20


class Origin(NamedTuple):
    """Values before they were quantized, and what they were quantized by.

    Attributes:
        x: the values; those of groups are split.
        scale: see :func:`~qframework.functional.fake_quantize`; None for 1.
        zero_point: see :func:`~qframework.functional.fake_quantize`.
        scheme: how.
        node: of the graph, that made the quantized values.
        shape: of the quantized values.
        made: the quantized values, which it doesn't keep alive.
        hooked: whether there were hooks on their gradient when a layer took them.
    """

    x: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: native.Scheme
    node: Any
    shape: torch.Size
    made: ReferenceType[Tensor]
    hooked: bool

    def gradient_is_seen(self) -> bool:
        """Whether hooks are given the gradient of the quantized values, who may write to it by any way."""
        made = self.made()
        return self.hooked or (made is not None and bool(made._backward_hooks))

    def values(self) -> Tensor:
        """The quantized values again."""
        made = self.quantized(self.x, self.scale, self.zero_point)
        return made if made.shape == self.shape else made.view(self.shape)

    def quantized(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        """Values on the same grid, by numbers of their own."""
        return quantize_as(self.scheme, x, scale, zero_point)

    def differentiable(self) -> Tensor:
        """The quantized values again, by the definition, as part of the graph that they were part of."""
        kind: type[Fused] = self.node._forward_cls
        made = kind.define(self.node, *self.node.saved_tensors[: len(kind.tensors)])
        return (made[0] if isinstance(made, tuple) else made).view(self.shape)  # type: ignore[no-any-return]

    def parts(self, at_once: int) -> Iterator[Part]:
        """Of what the quantized values are made, some indices of the first axis at a time.

        Args:
            at_once: how many bytes they are to have.
        """
        length = self.shape[0]
        some = max(1, at_once * length // max(1, self.x.numel() * self.x.element_size()))
        for start in range(0, length, some):
            place = slice(start, min(start + some, length))
            x, *numbers = (_some(t, self.x, place) for t in (self.x, self.scale, self.zero_point))
            assert x is not None
            yield Part(place, x, numbers[0], numbers[1], self)


class Part(NamedTuple):
    """Some rows of quantized values.

    Attributes:
        place: which.
        x: what they were made of.
        scale: by this scale.
        zero_point: and this zero point.
        whole: of which they are a part.
    """

    place: slice
    x: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    whole: Origin

    def values(self) -> Tensor:
        """The quantized values again."""
        made = self.whole.quantized(self.x, self.scale, self.zero_point)
        return made.view(-1, *self.whole.shape[1:])

    def sums(self, g: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the gradient of quantized rows gives their scales, see :func:`~qframework.kernels.native.row_absmax_sums`.

        Args:
            g: the gradient.
            y: room for the quantized values, which are written in the same pass; None for no values.
        """
        layout = (self.x.shape[0], self.x[0].numel())
        return native.row_absmax_sums(layout, g, self.x, self.scale, self.whole.scheme, y)  # type: ignore[arg-type]


def _some(t: Tensor | None, x: Tensor, place: slice) -> Tensor | None:
    """What belongs to some indices of the first axis of ``x``."""
    apart = t is not None and t.dim() == x.dim() and t.shape[0] != 1
    return t[place] if apart else t  # type: ignore[index]


class _Note(NamedTuple):
    """What quantized values know of their origin, which they don't keep alive: the graph does, as long as it is needed.

    Attributes:
        x, scale, zero_point, scheme, node, shape: of the origin.
        version: of the quantized values when they were made.
        memory: where they were; kept, so that no other has its address.
    """

    x: ReferenceType[Tensor]
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: native.Scheme
    node: Any
    shape: torch.Size
    version: int
    memory: torch.UntypedStorage

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies elsewhere know of no origin. Every reader of tensors may make a set, which is empty.
        return set, ()


def is_large(weight: Tensor) -> bool:
    """Whether a weight is made again rather than saved."""
    least = LARGE if weight.dim() < 3 else LARGE_KERNELS
    return weight.numel() >= least or settings.recompute == "always"


def origin_of(y: Tensor) -> Origin | None:
    """What ``y`` was made of; None where that isn't known, where it was written to since, and where it doesn't count."""
    found: _Note | None = y.__dict__.get("origin")
    if (
        not found
        or y.is_leaf
        or y.output_nr != 0
        or y._version != found.version
        or y.untyped_storage()._cdata != found.memory._cdata
        or not is_grad_enabled()
        or not may_fuse()
        or torch.is_autocast_enabled("cpu" if y.is_cpu else y.device.type)
    ):
        return None
    x = found.x()
    return None if x is None else Origin(x, *found[1:6], ref(y), bool(y._backward_hooks))


def knows_origin(quantized: object) -> bool:
    """Whether quantized values know what they were made of, see :func:`forget_origin`."""
    if is_compiling():
        return False
    y = quantized.value if isinstance(quantized, QuantTensor) else quantized
    return isinstance(y, Tensor) and "origin" in y.__dict__


def forget_origin(quantized: object) -> None:
    """Let quantized values not know what they were made of, since code of a user's own may have written to them by any way.

    Args:
        quantized: a tensor, or a quantized one; anything else is left alone.
    """
    if is_compiling():
        return
    y = quantized.value if isinstance(quantized, QuantTensor) else quantized
    if isinstance(y, Tensor):
        y.__dict__.pop("origin", None)


def keep_origin(viewed: Tensor, y: Tensor) -> Tensor:
    """``viewed``, which is ``y`` in another shape and knows so what it was made of.

    Args:
        viewed: all elements of ``y``, in the same order, or a part of them.
        y: quantized values.
    """
    found: _Note | None = None if is_compiling() else y.__dict__.get("origin")
    if found and viewed.numel() == y.numel() and viewed is not y:
        viewed.origin = found._replace(shape=viewed.shape)  # type: ignore[attr-defined]
    return viewed


def note_origin(
    y: Tensor,
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    scheme: native.Scheme,
) -> Tensor:
    """Let ``y`` know what it can be made of again, where that is quick, and saves memory worth the time."""
    wanted = settings.recompute
    quick = x.is_cpu and settings.kernels == "auto" and x.numel() >= tensors.SMALLEST
    if type(x) is Parameter and not is_large(x):
        return y
    if wanted != "never" and (quick or wanted == "always") and y.requires_grad:
        made_of = (scale, zero_point, scheme, y.grad_fn, y.shape)
        y.origin = _Note(ref(x), *made_of, y._version, y.untyped_storage())  # type: ignore[attr-defined]
    return y
