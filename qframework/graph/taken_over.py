"""What a quantized layer takes over from the float one."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = tuple(
    n
    for n in nn.Module().__dict__
    if "hook" in n and n.startswith(("_forward", "_back", "_is_full"))
)


def hold(made: nn.Module, key: str, module: nn.Module) -> None:
    """Take over a parameter or buffer that the torch layer doesn't have."""
    if key in module._parameters:
        made.register_parameter(key, module._parameters[key])
    else:
        made.register_buffer(key, module._buffers[key])


def take_over(module: nn.Module, made: nn.Module, copies: bool) -> None:
    """Parameters, mode and hooks of the float layer."""
    if copies:
        made.load_state_dict(module.state_dict(), strict=False)
    else:
        for key, parameter in module._parameters.items():
            if key in made._parameters and parameter is not None:
                setattr(made, key, parameter)
    made.train(module.training)
    for key, held in vars(module).items():
        if not key.startswith("_") and key not in vars(made) and not callable(held):
            vars(made)[key] = held  # what a user, or a class of its own, has noted there
    for hooks in _HOOKS:
        held = getattr(module, hooks)
        if isinstance(held, dict):
            getattr(made, hooks).update(held)
        else:
            setattr(made, hooks, held)


def fold(module: Any, made: Any, norm: nn.Module) -> None:
    """Fold a batch norm into a copy of the weights."""
    for name in ("weight", "bias"):
        old = getattr(module, name)
        if old is not None:
            setattr(made, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    made.merge_bn_in(norm)
    made.bias.requires_grad_(module.weight.requires_grad)
