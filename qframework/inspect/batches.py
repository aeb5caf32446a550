"""Batches in the forms that users have them, run one after the other, with a progress bar."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Runs a model on one batch and returns what it gives.
Run = Callable[[nn.Module], Any]
#: A scalar tensor from a model and a batch.
Loss = Callable[[nn.Module, Any], Any]


class BatchError(TypeError, ValueError):
    """Batches that a model can't be run on."""


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
    if callable(batches) and not isinstance(batches, Iterable):
        yield batches
        return
    if not isinstance(batches, Iterable):
        raise BatchError(
            "batches must be an iterable of tensors, tuples or dicts, or a callable that runs the model; got "
            f"{type(batches).__name__}"
        )
    if isinstance(batches, (Mapping, str)) or hasattr(batches, "dim"):
        raise BatchError(
            f"batches is one {type(batches).__name__}, not an iterable of batches; give [batch]"
        )
    count = 0
    total = len(batches) if isinstance(batches, Sized) else None
    for batch in _shown(batches, total, progress):
        count += 1
        if loss is None:
            yield _Call(batch)
        else:
            yield _Loss(loss, batch)
    if count == 0:
        used_up = iter(batches) is batches
        raise BatchError(
            "batches: there are none"
            + ("; a generator is used up after one pass, give a list or a DataLoader" * used_up)
        )


class _Call:
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __call__(self, model: nn.Module) -> Any:
        args, kwargs = self._arguments()
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise BatchError(
                f"{type(model).__name__}.forward doesn't take a batch of {len(args) + len(kwargs)} arguments ({error}). A batch "
                "is what the model takes: a tensor, a tuple of arguments or a dict of keywords. For pairs of inputs and labels "
                "give a loss(model, batch), or ((x,) for x, _ in loader)"
            ) from None
        return model(*args, **kwargs)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = self.batch
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, (tuple, list)):
            return tuple(batch), {}
        return (batch,), {}


class _Loss:
    def __init__(self, loss: Loss, batch: Any) -> None:
        self.loss, self.batch = loss, batch

    def __call__(self, model: nn.Module) -> Any:
        return self.loss(model, self.batch)


def _shown(batches: Iterable[Any], total: int | None, progress: bool | None) -> Iterator[Any]:
    """The batches, with a bar on standard error: that of rich where it is installed, a line of text else."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from batches
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        of = "" if total is None else f" of {total}"
        for i, batch in enumerate(batches):
            sys.stderr.write(f"\rbatch {i + 1}{of}")
            sys.stderr.flush()
            yield batch
        sys.stderr.write("\n")
        return
    console = Console(stderr=True)
    yield from track(batches, "batches", total=total, console=console, transient=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, for a while; the mode of each module is as it was afterwards."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
