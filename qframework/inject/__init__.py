"""Declarative quantizers: classes whose names are bound to values, classes and functions of other names."""

from qframework.inject.errors import (
    BuildError,
    CircularDependencyError,
    ImmutableQuantizerError,
    MissingDependencyError,
    PolicyTypeError,
    PolicyValueError,
    QuantizerError,
    UnknownNameError,
    UnusedKeywordWarning,
)
from qframework.inject.expressions import this, value
from qframework.inject.injector import BaseInjector, ExtendedInjector, Injector

__all__ = [
    "BaseInjector",
    "BuildError",
    "CircularDependencyError",
    "ExtendedInjector",
    "ImmutableQuantizerError",
    "Injector",
    "MissingDependencyError",
    "PolicyTypeError",
    "PolicyValueError",
    "QuantizerError",
    "UnknownNameError",
    "UnusedKeywordWarning",
    "this",
    "value",
]
