"""A statistic in the shape of the scale or zero point that is made of it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from qframework.core.naming import where


def reshaped(statistic: Any, part: nn.Module, shape: tuple[int, ...], of: str = "scale") -> Tensor:
    """A statistic in the shape of what is made of it.

    Args:
        statistic: what the part gave.
        part: that computes it.
        shape: to be.
        of: what is made of it.

    Raises:
        TypeError: no tensor.
        RuntimeError: another number of elements.
    """
    try:
        return statistic.reshape(shape)  # type: ignore[no-any-return]
    except AttributeError:
        raise TypeError(
            f"{where()}{type(part).__name__} computes the statistic of the {of} and has to return a tensor; "
            f"got a {type(statistic).__name__}"
        ) from None
    except RuntimeError as error:
        got = tuple(getattr(statistic, "shape", ()))
        if math.prod(got) == math.prod(shape):
            raise
        raise RuntimeError(
            f"{where()}{type(part).__name__} gave a statistic of shape {got}, {_count(math.prod(got))}, and the {of} has the "
            f"shape {tuple(shape)}, {_count(math.prod(shape))}; {_remedy(got, shape)}"
        ) from error


def _count(n: int) -> str:
    return f"{n} number{'' if n == 1 else 's'}"


def _remedy(got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if math.prod(shape) == 1:
        return "reduce all elements, or give the scale's granularity by scaling_per_output_type"
    if math.prod(got) == 1:
        return "reduce along stats_reduce_dim, which leaves one for each channel, or choose scaling_per_output_type='tensor'"
    return "give per_channel_broadcastable_shape as many channels as the input has, along the axis that scaling_stats_permute_dims brings first"
