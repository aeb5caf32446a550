"""The domain that a scale lives in, and the map from a stored number to a scale.

A learned scale is stored in the domain where gradient steps make sense (log2 for powers of two);
``to_domain`` maps a plain scale there, ``forward`` maps back onto the values that are allowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import Stateless
from qframework.core.function_wrapper import Identity, Rounding, RoundSte, ScalarSignedClampMinSte
from qframework.functional import abs_binary_sign_grad, is_fused, statistic_scale, stored_scale


class RestrictValue(Stateless):
    """Base: the identity in both directions."""

    def to_domain(self, x: Tensor) -> Tensor:
        """The stored number for the scale ``x``."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The scale for the stored number ``x``."""
        return x


class FloatRestrictValue(RestrictValue):
    """Any positive number: ``|x|``, with gradient +1 at 0."""

    def to_domain(self, x: Tensor) -> Tensor:
        return x.abs()

    def forward(self, x: Tensor) -> Tensor:
        return abs_binary_sign_grad(x)


class SignedFloatRestrictValue(RestrictValue):
    """Any number."""


class LogFloatRestrictValue(RestrictValue):
    """Any positive number, stored as its logarithm: ``2^x``."""

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
        restrict_scaling_impl: RestrictValue,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
    ) -> None:
        super().__init__()
        self.restrict = restrict_scaling_impl
        self.restrict_threshold = restrict_threshold_impl or restrict_scaling_impl
        self.restrict_quotient = restrict_scale_threshold_impl or Identity()
        self.clamp_min = ScalarSignedClampMinSte(scaling_min_val) if scaling_min_val else Identity()

    def to_domain(self, scale: Tensor) -> Tensor:
        """The stored number for ``scale``, which is first kept above the minimum."""
        return self.restrict.to_domain(self.clamp_min(scale))

    def threshold(self, threshold: Tensor) -> Tensor:
        """The threshold in its domain."""
        if type(self.restrict_threshold) is FloatRestrictValue:
            return threshold  # positive
        return self.restrict_threshold(self.restrict_threshold.to_domain(threshold))  # type: ignore[no-any-return]

    def divide(self, scale: Tensor, threshold: Tensor | None = None) -> Tensor:
        """``scale`` over the restricted threshold (1 when None)."""
        if threshold is not None:
            scale = scale / self.threshold(threshold)
        return self.restrict_quotient(scale)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a stored number."""
        fused = self.fused()
        if fused is not None and threshold is not None and is_fused():
            return stored_scale(stored, self.threshold(threshold), *fused)
        return self.divide(self.clamp_min(self.restrict(stored)), threshold)

    def of_statistic(self, statistic: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a statistic: ``forward(to_domain(statistic))``."""
        fused = self.fused()
        if fused is not None and threshold is not None and is_fused():
            return statistic_scale(statistic, self.threshold(threshold), *fused)
        return self.forward(self.to_domain(statistic), threshold)

    def fused(self) -> tuple[str, str, float | None] | None:
        """Domain, rounding and minimum for the fused functions, where these do what the parts do."""
        domain = _FUSED_DOMAINS.get(type(self.restrict))
        if domain is None or type(self.restrict_quotient) is not Identity:
            return None
        clamp: Any = self.clamp_min
        minimum: float | None = None if type(clamp) is Identity else clamp.min_val
        rule = "round"
        if domain == "power_of_two":
            rounding: Any = self.restrict.float_to_int_impl
            if type(rounding).forward is not Rounding.forward:
                return None
            rule = rounding.rule
        return domain, rule, minimum


_FUSED_DOMAINS = {
    FloatRestrictValue: "fp",
    LogFloatRestrictValue: "log_fp",
    PowerOfTwoRestrictValue: "power_of_two",
}
