"""A model as it evaluates, while it is written to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, set without telling the modules: nothing is collected, switched or thawed; afterwards all is as before.

    Args:
        model: of any class.
    """
    before = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in before:
            module.__dict__["training"] = False
        yield
    finally:
        for module, training in before:
            module.__dict__["training"] = training
