"""Errors in the declaration of a quantizer. Each is also a builtin error that a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantizerError(Exception):
    """A quantizer can't be built as it is declared."""


class UnknownNameError(QuantizerError, TypeError):
    """A keyword or attribute that nothing reads."""


class UnusedKeywordWarning(UserWarning):
    """A keyword that quantizers know and the one that it was given to has no use for."""


class PolicyValueError(QuantizerError, ValueError):
    """A value of the wrong type or out of range."""


class MissingDependencyError(QuantizerError, AttributeError):
    """A name that something needs and nothing gives."""


class CircularDependencyError(QuantizerError, RuntimeError):
    """Names that need each other."""


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of ``names``, whatever their case; None when none is similar."""
    spelled = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence and a question with the nearest name, or nothing."""
    close = nearest(name, names)
    return f". Did you mean {close!r}?" if close else ""


class PolicyTypeError(QuantizerError, TypeError):
    """A value of a type that a policy can't be."""


class BuildError(QuantizerError, RuntimeError):
    """A module of a quantizer refuses how it is put together."""


class ImmutableQuantizerError(QuantizerError, AttributeError):
    """An attempt to change a quantizer class."""
