"""A proxy in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qframework.configuration import settings
from qframework.proxy.kept import is_kept

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy


def describe(proxy: QuantProxy) -> str:
    """Format, bits, granularity and scaling: ``"int8 narrow, per tensor, stats max"``; with ``settings.verbose`` how it runs."""
    if proxy.tensor_quant is None:
        return "float"
    values = {row.name: row.value for row in proxy._rows}
    head = proxy._format(values)
    if not proxy.is_symmetric:
        head += ", zero point"
    if _choice(values, "bit_width_impl_type") == "parameter":
        head += ", learned width"
    parts = [head]
    by_product = getattr(proxy, "requires_input_scale", False)
    if "scaling_per_output_type" in values and not by_product:
        size = f" of {values['group_size']}" if proxy.is_groupwise else ""
        parts.append(f"per {_choice(values, 'scaling_per_output_type')}{size}")
    scaling = _choice(values, "scaling_impl_type")
    if by_product:
        parts.append("input scale x weight scale")
    elif scaling:
        statistic = _choice(values, "scaling_stats_op")
        domain = _choice(values, "restrict_scaling_type")
        parts.append(
            scaling
            + (f" {statistic}" if statistic else "")
            + (f" {domain}" if domain not in (None, "fp") else "")
        )
    if is_kept(proxy):
        parts.append("kept")
    if proxy.disable_quant:
        parts.append("disabled")
    elif settings.verbose:
        parts.append(f"runs {proxy.path()}")
    return ", ".join(parts)


def _choice(values: Mapping[str, str], name: str) -> str | None:
    return values[name].strip("'") if name in values else None
