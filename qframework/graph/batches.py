"""Calibration data in the forms that users have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from qframework.graph.layer_inputs import call_with


class EmptyPassError(ValueError, RuntimeError):
    """Batches that are used up, or none at all."""


class Batches:
    """Calibration data, for any number of passes.

    Args:
        given: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that is given the
            model and runs it.

    Raises:
        TypeError: neither of them.
    """

    def __init__(self, given: Any) -> None:
        self.given: Any = given.given if isinstance(given, Batches) else given
        given = self.given
        if not callable(given) and not isinstance(given, Iterable):
            raise TypeError(
                f"batches must be an iterable of tensors, tuples or dicts, or a callable that runs the model; got "
                f"{type(given).__name__}"
            )
        self.passes = 0

    @property
    def is_callable(self) -> bool:
        """Whether a callable runs the model."""
        return callable(self.given) and not isinstance(self.given, Iterable)

    def run(self, model: Callable[..., Any] | nn.Module) -> None:
        """One pass of all batches.

        Raises:
            EmptyPassError: there were none.
        """
        self.passes += 1
        if self.is_callable:
            self.given(model)
            return
        for batch in self:
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
