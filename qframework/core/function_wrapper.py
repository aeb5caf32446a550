"""Functions as modules: rounding, clamping, and the views that a statistic reduces over."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.core.base import NotStated, Stated, Stateless
from qframework.core.naming import where
from qframework.functional import (
    ROUNDINGS,
    Granularity,
    apply_step,
    scalar_clamp_min_ste,
    scalar_clamp_ste,
    tensor_clamp,
    tensor_clamp_ste,
)


class Rounding(Stateless):
    """A rounding with a straight-through gradient.

    Attributes:
        mode: one of :data:`qframework.functional.ROUNDINGS`.
    """

    mode = "round"

    def rule(self, stated: Stated) -> str:
        """The mode."""
        return self.mode

    def forward(self, x: Tensor) -> Tensor:
        """Integers in the shape and dtype of ``x``."""
        return apply_step(x, self.mode)


class RoundSte(Rounding):
    """Nearest integer, halves to even."""


class FloorSte(Rounding):
    """Next integer below."""

    mode = "floor"


class CeilSte(Rounding):
    """Next integer above."""

    mode = "ceil"


class RoundToZeroSte(Rounding):
    """Integer part."""

    mode = "round_to_zero"


class DPURoundSte(Rounding):
    """Nearest integer; halves to even, negative halves up."""

    mode = "dpu"


assert {c.mode for c in Rounding.__subclasses__()} == set(ROUNDINGS)


class TensorClamp(Stateless):
    """Clamp to tensor bounds; outside, the gradient goes to the bound."""

    def rule(self, stated: Stated) -> bool:
        """Whether the clamp is differentiated."""
        return True

    def forward(self, x: Tensor, min_val: Tensor, max_val: Tensor) -> Tensor:
        """``x`` between two bounds that broadcast to it."""
        return tensor_clamp(x, min_val, max_val)


class TensorClampSte(Stateless):
    """Clamp to tensor bounds; the gradient passes to the input unchanged."""

    def rule(self, stated: Stated) -> bool:
        """Whether the clamp is differentiated."""
        return False

    def forward(self, x: Tensor, min_val: Tensor, max_val: Tensor) -> Tensor:
        """``x`` between two bounds that broadcast to it."""
        return tensor_clamp_ste(x, min_val, max_val)


class InplaceTensorClampSte(TensorClampSte):
    """The name under which some quantizers ask for a straight-through clamp; it never touches its input."""


class ScalarClamp(Stateless):
    """Clamp to two numbers, with the true gradient."""

    def __init__(self, min_val: float | None, max_val: float | None) -> None:
        super().__init__()
        self.min_val, self.max_val = min_val, max_val

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.min_val, self.max_val)


class ScalarClampSte(ScalarClamp):
    """Clamp to two numbers; the gradient passes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return scalar_clamp_ste(x, self.min_val, self.max_val)


class ClampMin(Stateless):
    """Clamp from below, with the true gradient."""

    def __init__(self, min_val: float) -> None:
        super().__init__()
        self.min_val = min_val

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(self.min_val)


class ScalarClampMinSte(ClampMin):
    """Clamp from below; the gradient passes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return scalar_clamp_min_ste(x, self.min_val)


class ScalarSignedClampMinSte(ClampMin):
    """Keep the magnitude above ``min_val`` and the sign: ``sgn(x) * max(|x|, min_val)``, ``sgn(0) = 1``.

    The gradient passes unchanged. ``min_val`` must be positive.
    """

    def __init__(self, min_val: float) -> None:
        if not min_val > 0:
            raise ValueError(f"min_val must be > 0, got {min_val!r}")
        super().__init__(min_val)

    def rule(self, stated: Stated) -> float:
        """The minimum."""
        return self.min_val

    def forward(self, x: Tensor) -> Tensor:
        """Numbers in the shape and dtype of ``x``."""
        below = scalar_clamp_ste(x, None, -self.min_val)
        return torch.where(x < 0, below, scalar_clamp_ste(x, self.min_val, None))


class Identity(Stateless):
    """The input itself."""

    def rule(self, stated: Stated) -> None:
        """Nothing is done."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Abs(Stateless):
    """Absolute value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class PowerOfTwo(Stateless):
    """``2 ** x``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp2(x)


class LogTwo(Stateless):
    """``log2(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log2(x)


class OverTensorView(Stateless):
    """All elements in one axis: ``(n,)``."""

    def rule(self, stated: Stated) -> Granularity:
        """One statistic for all."""
        return Granularity(None)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1)


class OverOutputChannelView(Stateless):
    """One row per output channel: ``(C, n)``, after ``permute_dims`` has brought the channels first."""

    def __init__(self, permute_dims: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if permute_dims is not None:
            n = len(permute_dims)
            if sorted(d + n if d < 0 else d for d in permute_dims) != list(range(n)):
                raise ValueError(
                    f"scaling_stats_permute_dims={tuple(permute_dims)} has to name each of {n} axes once, such as (1, 0, 2, 3)"
                )
        self.permute_dims = permute_dims

    def rule(self, stated: Stated) -> Granularity:
        """The axis that changes places with the first one."""
        order = self.permute_dims
        if order is None:
            return Granularity(0)
        axis, swapped = order[0], list(range(len(order)))
        swapped[0], swapped[axis] = axis, 0
        if tuple(swapped) != tuple(order):
            raise NotStated(f"permute_dims={tuple(order)} does more than to bring an axis first")
        return Granularity(axis)

    def forward(self, x: Tensor) -> Tensor:
        """One row per channel."""
        if self.permute_dims is not None:
            if len(self.permute_dims) != x.dim():
                raise ValueError(
                    f"{where()}scaling_stats_permute_dims={tuple(self.permute_dims)} is for {len(self.permute_dims)} "
                    f"axes, the input has {x.dim()}: {tuple(x.shape)}"
                )
            x = x.permute(*self.permute_dims)
        return x.reshape(x.shape[0], -1)


class OverBatchOverTensorView(Stateless):
    """One row per sample: ``(N, n)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


class OverBatchOverOutputChannelView(Stateless):
    """One row per sample and channel: ``(N, C, n)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1)


class OverOutputFeaturesView(Stateless):
    """One row per position of the leading axes: ``(n, F)``; one number is a row."""

    def rule(self, stated: Stated) -> Granularity:
        """A statistic for each row."""
        return Granularity(rows=True)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1] if x.dim() else 1)
