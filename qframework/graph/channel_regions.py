"""Channels that layers share, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx, nn

#: What is moved across: factors of channels; a rotation, which norms by the root mean square let pass; a shift of the mean,
#: which ends at layer norms.
FACTORS, ROTATION, MEAN = "factors", "rotation", "mean"

#: The axis of channels: the second one, with spatial axes behind it; the last one; or the last one, made of channels and
#: positions by flattening.
SECOND, LAST, FLAT = "second", "last", "flat"


@dataclass
class Held:
    """The channels of one tensor.

    Attributes:
        ids: their numbers.
        axis: where they are.
    """

    ids: list[int]
    axis: str


@dataclass
class Use:
    """One layer's side of a region.

    Attributes:
        name: of the layer.
        layer: itself.
        ids: for each of its channels on this side the number of the region's channel.
        calls: nodes that call it.
    """

    name: str
    layer: nn.Module
    ids: Tensor
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass
class Region:
    """Channels that a factor for each can be moved across.

    Attributes:
        sources: layers whose output channels they are.
        sinks: layers whose input channels they are.
        size: number of channels.
        free: for each channel, whether nothing else reads or writes it.
        most: for each channel the largest factor that what bounds it allows.
        reasons: why some aren't.
        tensors: nodes whose results hold the channels.
    """

    sources: list[Use]
    sinks: list[Use]
    size: int
    free: Tensor
    reasons: list[str]
    tensors: list[fx.Node] = field(default_factory=list)
    most: Tensor | None = None

    @property
    def is_free(self) -> bool:
        """Whether all channels can be scaled."""
        return bool(self.free.all())
