"""What proxies do while a state dict is loaded: older names of entries, and quantizers that follow their parameters."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy


def take_older_keys(state_dict: dict[str, Any], prefix: str) -> None:
    """Rename entries that the reference library has named otherwise, and drop those that hold nothing.

    Args:
        state_dict: that is loaded; changed in place.
        prefix: of the proxy.
    """
    older = prefix + "fused_activation_quant_proxy."
    for key in [k for k in state_dict if k.startswith(older)]:
        state_dict[prefix + key.removeprefix(older)] = state_dict.pop(key)
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith("zero_hw_sentinel")]:
        del state_dict[key]


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """A state dict without entries of a quantizer is that of a float layer: nothing is missing, and it starts from the weights."""
    proxy = cast("QuantProxy", module)
    prefix = proxy._absent_prefix
    if prefix is None:
        return
    proxy._absent_prefix = None
    missing = incompatible.missing_keys
    missing[:] = [k for k in missing if not k.startswith(prefix)]
    proxy.reinitialize()


#: torch numbers hooks that are registered from 0.
LOAD_HOOKS: OrderedDict[int, Any] = OrderedDict([(-1, _after_load)])
