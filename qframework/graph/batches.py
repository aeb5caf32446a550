"""Calibration data in the forms that users have it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from qframework.graph.layer_inputs import Call, call_with


class BatchError(TypeError, ValueError):
    """Batches that a model can't be run on."""


class EmptyPassError(BatchError, RuntimeError):
    """Batches that are used up, or none at all."""


class Batches:
    """Calibration data, for any number of passes.

    Args:
        given: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that is given the
            model and runs it.

    Raises:
        BatchError: neither of them, or one batch in place of several.
    """

    def __init__(self, given: Any) -> None:
        self.given: Any = given.given if isinstance(given, Batches) else given
        given = self.given
        if self.is_callable:
            return
        if not isinstance(given, Iterable):
            raise BatchError(
                "batches must be an iterable of tensors, tuples or dicts, or a callable that runs the model; got "
                f"{type(given).__name__}"
            )
        if isinstance(given, (Mapping, str, Tensor, Call)):
            raise BatchError(
                f"batches is one {type(given).__name__}, not an iterable of batches; give [batch]"
            )

    @property
    def is_callable(self) -> bool:
        """Whether a callable runs the model."""
        return callable(self.given) and not isinstance(self.given, Iterable)

    @property
    def count(self) -> int | None:
        """How many there are, where that is known."""
        return len(self.given) if isinstance(self.given, Sized) else None

    def run(self, model: Callable[..., Any] | nn.Module) -> None:
        """One pass of all batches.

        Raises:
            EmptyPassError: there were none.
            BatchError: they are of other arguments than the model takes.
        """
        if self.is_callable:
            self.given(model)
            return
        for batch in self:
            check_fits(model, batch)
            call_with(model, batch)

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            EmptyPassError: there are none.
        """
        count = 0
        for batch in self.given:
            count += 1
            yield batch
        if count == 0:
            again = iter(self.given) is self.given
            raise EmptyPassError(
                "batches: the generator is used up after its first pass; give a list, a DataLoader, or a callable that "
                "runs the model"
                if again
                else "batches: there are none"
            )


def check_fits(model: Any, batch: Any) -> None:
    """Refuse a batch of other arguments than a model takes.

    Raises:
        BatchError: with what a batch is.
    """
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Call):
        args, kwargs = batch.args, batch.kwargs
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    signature = None
    with suppress(TypeError, ValueError):  # of C, for instance
        signature = inspect.signature(getattr(model, "forward", model))
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(
            f"{type(model).__name__}.forward doesn't take a batch of {len(args) + len(kwargs)} arguments ({error}). A batch "
            "is what the model takes: a tensor, a tuple of arguments or a dict of keywords. For pairs of inputs and labels "
            "give a loss(model, batch) where that is taken, or [(x,) for x, _ in loader]"
        ) from None
