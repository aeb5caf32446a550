"""What proxies do while a state dict is loaded: older names of entries, and quantizers that follow their parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from qframework.core.base import CoreModule
from qframework.core.snapshot import Snapshot, unchanged_on_error

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


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Load a state dict into a model of any class, all of it or nothing.

    ``model.load_state_dict`` leaves a quantizer or quantized layer as it was, where its own entries are refused; torch has by
    then copied those of modules before it. This function holds a copy of the model's tensors while it loads.

    Args:
        model: with or without quantized layers.
        state_dict: its entries.
        strict: refuse missing and unexpected keys.
        assign: take the tensors themselves rather than their contents.

    Returns:
        What ``model.load_state_dict`` returns.

    Raises:
        RuntimeError: the state dict is refused; the message names the keys. The model is as it was.
    """
    with unchanged_on_error(model):
        return model.load_state_dict(state_dict, strict=strict, assign=assign)


class Loading:
    """What a proxy has to know when all of its parts are loaded.

    Args:
        proxy: that is loaded.
        state_dict: the entries.
        prefix: of the proxy.
        local_metadata: tells whether tensors are assigned rather than copied.
        strict, missing_keys, unexpected_keys, error_msgs: see ``torch.nn.Module._load_from_state_dict``.
    """

    def __init__(
        self,
        proxy: QuantProxy,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.prefix = prefix
        self.is_absent = not any(k.startswith(prefix) for k in state_dict)
        self.assigns = bool(local_metadata.get("assign_to_params_buffers", False))
        self._before = Snapshot(proxy)
        self._error_msgs, self._errors = error_msgs, len(error_msgs)

    @property
    def is_refused(self) -> bool:
        """Whether an entry couldn't be loaded."""
        return len(self._error_msgs) > self._errors

    def undo(self) -> None:
        """Let the proxy be as it was."""
        self._before.restore()


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """All or nothing of a quantizer is loaded, and nothing stays on the ``meta`` device where tensors were assigned.

    A state dict without entries of a quantizer is that of a float layer: nothing is missing, and it starts from the weights.
    """
    proxy = cast("QuantProxy", module)
    loading = proxy._loading
    if loading is None:
        return
    proxy._loading = None
    if loading.is_refused:
        loading.undo()
        return
    if loading.is_absent:
        missing = incompatible.missing_keys
        missing[:] = [k for k in missing if not k.startswith(loading.prefix)]
        proxy.reinitialize()
    if loading.assigns:
        _leave_meta(proxy)


def _leave_meta(proxy: QuantProxy) -> None:
    """Constants, which no state dict holds, go where the other tensors of the quantizer or its layer are."""
    quantizer = proxy.tensor_quant
    if quantizer is None:
        return
    layer = proxy.tracked_module_list[0]
    tensors = (*quantizer.parameters(), *layer.parameters(recurse=False))
    device = next((t.device for t in tensors if not t.is_meta), None)
    if tensors and device is None:
        return
    for part in quantizer.modules():
        if isinstance(part, CoreModule):
            part.leave_meta(device)


#: torch numbers hooks that are registered from 0.
LOAD_HOOKS: OrderedDict[int, Any] = OrderedDict([(-1, _after_load)])
