"""Batches in the forms that users have them, run one after the other, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from qframework.graph.batches import Batches, check_fits
from qframework.graph.layer_inputs import call_with
from qframework.graph.progress import shown

#: Runs a model on one batch and returns what it gives.
Run = Callable[[nn.Module], Any]
#: A scalar tensor from a model and a batch.
Loss = Callable[[nn.Module, Any], Any]


def runs(batches: Any, loss: Loss | None = None, progress: bool | None = None) -> Iterator[Run]:
    """What runs a model on each batch.

    Args:
        batches: an iterable of tensors (``model(x)``), tuples or lists (``model(*batch)``) or dicts (``model(**batch)``); or
            a callable that is given the model and runs it, as one batch.
        loss: called with the model and the batch in place of the model.
        progress: show a bar; None for only on a terminal.

    Raises:
        BatchError: neither of them, none at all, or batches of other arguments than the model takes.
    """
    data = Batches(batches)
    if data.is_callable:
        yield data.given
        return
    for batch in shown(data, data.count, progress, "batches"):
        yield _Call(batch) if loss is None else _Loss(loss, batch)


class _Call:
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __call__(self, model: nn.Module) -> Any:
        check_fits(model, self.batch)
        return call_with(model, self.batch)


class _Loss:
    def __init__(self, loss: Loss, batch: Any) -> None:
        self.loss, self.batch = loss, batch

    def __call__(self, model: nn.Module) -> Any:
        return self.loss(model, self.batch)
