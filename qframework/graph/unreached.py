"""What becomes of activation quantizers that no batch reached: they take the scale of the same quantizer beside them, where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qframework.proxy import ActQuantProxyFromInjector


def _kind(name: str) -> str:
    """A name without the numbers of modules in lists, which is that of all experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


@contextmanager
def noting_calls(model: nn.Module, called: set[nn.Module]) -> Iterator[None]:
    """Note which activation quantizers are called."""
    handles = [
        m.register_forward_pre_hook(lambda proxy, _: called.add(proxy))
        for m in model.modules()
        if isinstance(m, ActQuantProxyFromInjector)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def borrow_scales(model: nn.Module, called: set[nn.Module]) -> dict[str, str]:
    """Give quantizers that weren't calibrated the state of one of the same name but for the numbers in lists.

    Args:
        model: calibrated.
        called: the quantizers that data reached.

    Returns:
        For each one that wasn't reached what was done.
    """
    by_kind: dict[str, tuple[str, Any]] = {}
    waiting: list[tuple[str, Any]] = []
    for name, proxy in model.named_modules():
        if not isinstance(proxy, ActQuantProxyFromInjector) or not proxy.is_quant_enabled:
            continue
        if proxy in called:
            by_kind.setdefault(_kind(name), (name, proxy))
        elif proxy.state_dict():
            waiting.append((name, proxy))
    found = {}
    for name, proxy in waiting:
        source, other = by_kind.get(_kind(name), ("", None))
        state = {} if other is None else other.state_dict()
        shapes = {k: t.shape for k, t in proxy.state_dict().items()}
        if {k: t.shape for k, t in state.items()} == shapes:
            proxy.load_state_dict(state)
            found[name] = f"no batch reached it: it has the scale of {source}"
        else:
            found[name] = "no batch reached it: it has no scale yet"
    return found
