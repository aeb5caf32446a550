"""Checks of what functions are given."""

from __future__ import annotations

from torch import nn


def check_module(model: object, caller: str, name: str = "model") -> None:
    """Refuse anything but a module.

    Args:
        model: given.
        caller: the function that was called.
        name: of its argument.

    Raises:
        TypeError: no module; the message says what ``quantize_model`` returns.
    """
    if isinstance(model, nn.Module):
        return
    hint = (
        "; quantize_model and ptq return the model and a report: quantized, report = ..."
        if isinstance(model, tuple)
        else "; make an instance first"
        if isinstance(model, type)
        else ""
    )
    raise TypeError(
        f"{caller}: {name} must be a torch.nn.Module; got a {type(model).__name__}{hint}"
    )
