"""The domain that a scale lives in, and the map from a stored number to a scale.

A learned scale is stored in the domain where gradient steps make sense (log2 for powers of two);
``to_domain`` maps a plain scale there, ``forward`` maps back onto the values that are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qframework.core.base import NotStated, Stated, Stateless, local_part
from qframework.core.function_wrapper import Identity, RoundSte, ScalarSignedClampMinSte
from qframework.functional import RestrictionRule, ScaleRule, abs_binary_sign_grad


class RestrictValue(Stateless):
    """Base: the identity in both directions."""

    def to_domain(self, x: Tensor) -> Tensor:
        """The stored number for the scale ``x``."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The scale for the stored number ``x``."""
        return x

    def saved(self, stored: Tensor) -> Tensor:
        """The number itself."""
        return stored

    def why_refused(self, stored: Tensor) -> str | None:
        """Why a stored number can't be that of a scale; None where it can."""
        scale = self.forward(stored)
        if bool((torch.isfinite(scale) & (scale > 0)).all()):
            return None
        return "numbers whose scale is positive and finite"


class FloatRestrictValue(RestrictValue):
    """Any positive number: ``|x|``, with gradient +1 at 0."""

    def rule(self, stated: Stated) -> RestrictionRule:
        """The domain ``'fp'``."""
        return RestrictionRule("fp")

    def to_domain(self, x: Tensor) -> Tensor:
        return x.abs()

    def forward(self, x: Tensor) -> Tensor:
        return abs_binary_sign_grad(x)

    def saved(self, stored: Tensor) -> Tensor:
        """The magnitude, which is what counts: training may have gone through 0."""
        part = local_part(stored)
        return stored.abs() if part is not None and bool((part < 0).any()) else stored

    def why_refused(self, stored: Tensor) -> str | None:
        """A number that isn't positive is none of a scale."""
        allowed = bool((torch.isfinite(stored) & (stored > 0)).all())
        return None if allowed else "positive, finite numbers"


class SignedFloatRestrictValue(RestrictValue):
    """Any number."""

    def why_refused(self, stored: Tensor) -> str | None:
        """A number that isn't finite is none of a scale."""
        return None if bool(torch.isfinite(stored).all()) else "finite numbers"


class LogFloatRestrictValue(RestrictValue):
    """Any positive number, stored as its logarithm: ``2^x``."""

    def rule(self, stated: Stated) -> RestrictionRule:
        """The domain ``'log_fp'``."""
        return RestrictionRule("log_fp")

    def to_domain(self, x: Tensor) -> Tensor:
        return torch.log2(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp2(x)


class IntRestrictValue(RestrictValue):
    """Integers: ``round(x)``, by any rounding rule."""

    def __init__(self, restrict_value_float_to_int_impl: nn.Module | None = None) -> None:
        super().__init__()
        self.float_to_int_impl = restrict_value_float_to_int_impl or RoundSte()

    def forward(self, x: Tensor) -> Tensor:
        return self.float_to_int_impl(x)  # type: ignore[no-any-return]


class PowerOfTwoRestrictValue(RestrictValue):
    """Powers of two, stored as exponents: ``2^round(x)``, by any rounding rule."""

    def __init__(self, restrict_value_float_to_int_impl: nn.Module | None = None) -> None:
        super().__init__()
        self.float_to_int_impl = restrict_value_float_to_int_impl or RoundSte()

    def rule(self, stated: Stated) -> RestrictionRule:
        """The domain ``'power_of_two'`` and its rounding."""
        return RestrictionRule("power_of_two", stated(self.float_to_int_impl))

    def to_domain(self, x: Tensor) -> Tensor:
        return torch.log2(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp2(self.float_to_int_impl(x))


class ScaleRestriction(Stateless):
    """The end of every scale: ``final(max(restrict(v), minimum) / restrict(threshold))``.

    Args:
        restrict_scaling_impl: domain of ``v``.
        restrict_threshold_impl: domain of the threshold; that of the scale when None.
        restrict_scale_threshold_impl: applied to the quotient.
        scaling_min_val: lower bound of the magnitude; its gradient passes unchanged.
    """

    def __init__(
        self,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
    ) -> None:
        super().__init__()
        self.restrict = restrict_scaling_impl or FloatRestrictValue()
        self.restrict_threshold = restrict_threshold_impl or self.restrict
        self.restrict_quotient = restrict_scale_threshold_impl or Identity()
        self.clamp_min = ScalarSignedClampMinSte(scaling_min_val) if scaling_min_val else Identity()

    def rule(
        self,
        stated: Stated,
        source: str,
        threshold: float,
        shape: tuple[int, ...],
        channel_axis: int | None = None,
        reduced_axis: int | None = None,
        groups: tuple[int, int] | None = None,
    ) -> ScaleRule:
        """The scale that is made of a source; see :class:`~qframework.functional.ScaleRule`.

        Args:
            stated: gives the rules of the parts.
            source: ``'absmax'``, ``'minmax'`` or ``'learned'``.
            threshold: the integer that the magnitude is divided by, before its own restriction.
            shape: of the scale.
            channel_axis: whose indices have a scale each.
            reduced_axis: whose elements share one.
            groups: that the values are split into.
        """
        if stated(self.restrict_quotient) is not None:
            raise NotStated("restrict_scale_threshold_impl changes the scale")
        restriction: RestrictionRule = stated(self.restrict)
        of_threshold: RestrictionRule = stated(self.restrict_threshold)
        threshold = _restricted(threshold, of_threshold)
        minimum = stated(self.clamp_min)
        how = (restriction.domain, restriction.rounding, minimum)
        return ScaleRule(source, threshold, *how, shape, channel_axis, reduced_axis, groups)

    def to_domain(self, scale: Tensor) -> Tensor:
        """The stored number for ``scale``, which is first kept above the minimum."""
        return self.restrict.to_domain(self.clamp_min(scale))

    def saved(self, stored: Tensor) -> Tensor:
        """What a state dict holds for a stored number: the same scale."""
        positive = getattr(self.restrict, "saved", None)
        return stored if positive is None else positive(stored)

    def why_refused(self, stored: Tensor) -> str | None:
        """Why a number of a state dict can't be that of a scale; None where it can."""
        check = getattr(self.restrict, "why_refused", None)
        return None if check is None else check(stored)

    def threshold(self, threshold: Tensor) -> Tensor:
        """The threshold in its domain."""
        return self.restrict_threshold(self.restrict_threshold.to_domain(threshold))  # type: ignore[no-any-return]

    def divide(self, scale: Tensor, threshold: Tensor | None = None) -> Tensor:
        """``scale`` over the restricted threshold (1 when None)."""
        if threshold is not None:
            scale = scale / self.threshold(threshold)
        return self.restrict_quotient(scale)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a stored number.

        Args:
            stored: in the domain of the scale, of its shape.
            threshold: positive, 0-dim; None for 1.
        """
        return self.divide(self.clamp_min(self.restrict(stored)), threshold)

    def of_statistic(self, statistic: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a statistic: ``forward(to_domain(statistic))``."""
        return self(self.to_domain(statistic), threshold)  # type: ignore[no-any-return]


_WHOLE: dict[str, Callable[[float], int]] = {
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "round_to_zero": math.trunc,
}


def _restricted(threshold: float, restriction: RestrictionRule) -> float:
    """A threshold as its domain has it.

    Raises:
        NotStated: it is rounded there in a way that isn't known.
    """
    if restriction.domain == "fp":
        return threshold
    exponent = math.log2(threshold)
    if exponent.is_integer():
        return threshold
    # Near an integer, or half of one, a logarithm in single precision may fall on another side.
    clear = abs(2 * exponent - round(2 * exponent)) > 1e-4
    if restriction.domain == "power_of_two" and clear and restriction.rounding in _WHOLE:
        return float(2.0 ** _WHOLE[restriction.rounding](exponent))
    raise NotStated(f"the threshold {threshold:g} is rounded in its domain")
