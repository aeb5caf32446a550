"""Scales that don't look at any data: a constant, a learned parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stated, held_number, number_of, parameter_of
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.functional import ScaleRule, compute_dtype


def _as_scale(
    init: float | Tensor, dtype: torch.dtype | None, device: torch.device | None
) -> Tensor:
    place = torch.empty(0, device=device).device  # torch's default where None
    if isinstance(init, Tensor):
        return init.detach().to(dtype=compute_dtype(dtype or init.dtype), device=place, copy=True)
    return torch.tensor(float(init), dtype=compute_dtype(dtype), device=place)


class ConstScaling(CoreModule):
    """A fixed threshold: ``scale = max(init, minimum) / threshold``, in the domain of the restriction.

    Args:
        scaling_init: positive number, or tensor of the shape of the scale.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        dtype, device: of the stored tensor.
    """

    depends_on_input = False
    value: Tensor

    def __init__(
        self,
        scaling_init: float | Tensor,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        init = _as_scale(scaling_init, dtype, torch.device("cpu"))
        self.register_constant("value", self.restriction.to_domain(init), init.dtype, device)

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The scale for a threshold."""
        return stated(self.restriction, "learned", threshold, tuple(self.value.shape))  # type: ignore[no-any-return]

    def stored(self) -> Tensor:
        """The number in its domain."""
        return self.value

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a 0-dim threshold (1 when None); ``x`` is not looked at."""
        return self.restriction(self.stored(), threshold)  # type: ignore[no-any-return]


class ParameterScaling(CoreModule):
    """A learned threshold; state-dict key ``value``, stored in the domain of the restriction.

    Args:
        scaling_init: positive number or tensor.
        scaling_shape: shape of the scale, that of ``scaling_init`` when None.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
        dtype, device: of the parameter.

    Raises:
        RuntimeError: ``scaling_init`` doesn't fit ``scaling_shape``.
    """

    depends_on_input = False

    def __init__(
        self,
        scaling_init: float | Tensor,
        scaling_shape: tuple[int, ...] | None = None,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.restriction = ScaleRestriction(
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )
        init = _as_scale(scaling_init, dtype, device)
        if scaling_shape is not None:
            if init.numel() > 1 and init.shape != torch.Size(scaling_shape):
                raise RuntimeError(
                    f"scaling_init has shape {tuple(init.shape)}, scaling_shape is {tuple(scaling_shape)}; "
                    "give one number, or a tensor of that shape"
                )
            init = (
                init.reshape(scaling_shape)
                if init.numel() > 1
                else init.reshape(()).expand(scaling_shape)
            )
        self.shape = tuple(init.shape)
        self.value = parameter_of(self.restriction.to_domain(init).clone())

    def rule(self, stated: Stated, threshold: float) -> ScaleRule:
        """The learned scale for a threshold."""
        return stated(self.restriction, "learned", threshold, tuple(self.stored().shape))  # type: ignore[no-any-return]

    def stored(self) -> Tensor:
        """The learned number in its domain."""
        return number_of(self.value, self.shape)

    def held(self) -> Tensor:
        """:meth:`stored`, see :func:`~qframework.core.base.held_number`."""
        return held_number(self.value, self.shape)

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale for a 0-dim threshold (1 when None); ``x`` is not looked at."""
        return self.restriction(self.stored(), threshold)  # type: ignore[no-any-return]

    def saved(self, name: str, number: Tensor) -> Tensor:
        """A positive number."""
        return self.restriction.saved(number)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A number that is none of a scale."""
        return self.restriction.why_refused(number)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept the older key ``learned_value``."""
        if prefix + "learned_value" in state_dict:
            state_dict[prefix + "value"] = state_dict.pop(prefix + "learned_value")
        super()._load_from_state_dict(state_dict, prefix, *args)
