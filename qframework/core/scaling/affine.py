"""A learned affine map on a statistic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, number_of, parameter_of
from qframework.core.restrict_val import ScaleRestriction
from qframework.functional import ScaleRule, compute_dtype


class AffineRescaling(CoreModule):
    """``y = x * affine_weight + affine_bias``; the bias only when it is asked for.

    Args:
        rescaling_init: initial weight.
        shifting_init: initial bias, None for no bias.
        shape: of both.
        dtype, device: of the parameters.
    """

    affine_bias: nn.Parameter | None

    def __init__(
        self,
        rescaling_init: float,
        shifting_init: float | None,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        start = torch.ones(shape, dtype=compute_dtype(dtype), device=device)
        self.shape = tuple(shape)
        self.affine_weight = parameter_of(start * rescaling_init)
        self.affine_bias = None
        if shifting_init is not None:
            self.affine_bias = parameter_of(start * shifting_init)

    def forward(self, x: Tensor) -> Tensor:
        """The map of ``x``, of its shape."""
        x = x * number_of(self.affine_weight, self.shape)
        return x if self.affine_bias is None else x + number_of(self.affine_bias, self.shape)


def affine_or_none(
    rescaling_init: float | None,
    shifting_init: float | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device | None,
    names: str,
) -> AffineRescaling | None:
    """An :class:`AffineRescaling` where one is asked for.

    Raises:
        RuntimeError: a shift without a rescaling.
    """
    if rescaling_init is None:
        if shifting_init is not None:
            raise RuntimeError(
                f"{names}_affine_shifting_init={shifting_init!r} needs {names}_affine_rescaling_init as well; "
                "give 1.0 to start with no rescaling"
            )
        return None
    return AffineRescaling(rescaling_init, shifting_init, shape, dtype, device)


class StatsScaling(CoreModule):
    """From a statistic to a scale: minimum, domain, optional affine map, restriction, threshold.

    Args:
        restriction: the domain of the scale.
        affine: the map; None for none.
    """

    affine_rescaling: AffineRescaling | None

    def __init__(self, restriction: ScaleRestriction, affine: AffineRescaling | None) -> None:
        super().__init__()
        self.restriction = restriction
        self.affine_rescaling = affine

    def rule(self, stated: Stated, *source: Any) -> ScaleRule:
        """The scale of a statistic; arguments as for :meth:`ScaleRestriction.rule`."""
        if self.affine_rescaling is not None:
            raise NotStated("an affine map is learned on the statistic")
        return stated(self.restriction, *source)  # type: ignore[no-any-return]

    def stored(self, statistic: Tensor) -> Tensor:
        """The statistic in the domain of the restriction, after the affine map."""
        stored: Tensor = self.restriction.to_domain(statistic)
        return stored if self.affine_rescaling is None else self.affine_rescaling(stored)

    def forward(self, statistic: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale of a statistic, of its shape."""
        return self.restriction(self.stored(statistic), threshold)  # type: ignore[no-any-return]
