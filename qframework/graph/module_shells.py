"""Copies of modules that share their parameters."""

from __future__ import annotations

import copy

from torch import nn


def shell(module: nn.Module) -> nn.Module:
    """A module with the same parameters, buffers of its own, and hooks and children that are listed anew."""
    result: nn.Module = object.__new__(type(module))  # parametrized modules refuse copy.copy
    result.__dict__.update(module.__dict__)
    for name in nn.Module().__dict__:
        held = module.__dict__.get(name)
        if isinstance(held, (dict, set)):
            result.__dict__[name] = copy.copy(held)
    buffers = module.__dict__["_buffers"]
    result.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in buffers.items()}
    return result


def shell_tree(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module whose submodules are shells too; ``done`` says which stands for which."""
    if module not in done:
        done[module] = result = shell(module)
        for child, held in module._modules.items():
            if held is not None:
                result._modules[child] = shell_tree(held, done)
    return done[module]
