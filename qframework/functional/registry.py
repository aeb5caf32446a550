"""Functions whose body is their definition, and to which faster forms are added.

A function marked by :func:`defined` runs the first of its kernels that serves the arguments, and its own body where none does. The
body says what the function means: kernels are held against it. This room knows of no kernel; those of
:mod:`qframework.kernels` register themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(NamedTuple, Generic[R]):
    """A faster form of a function.

    Attributes:
        name: what it is, for people.
        serves: whether it gives for some arguments what the definition gives.
        run: the form itself, which may yet return ``NotImplemented``; both are called with all arguments of the function, by
            position.
    """

    name: str
    serves: Callable[..., bool]
    run: Callable[..., R]


class Defined(Protocol[P, R]):
    """A function with a definition and kernels.

    Attributes:
        definition: the body, which no kernel takes the place of.
        kernels: faster forms; the first that serves runs.
    """

    definition: Callable[P, R]
    kernels: list[Kernel[R]]
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result, by the first kernel that serves or by the definition."""


def defined(body: Callable[P, R]) -> Defined[P, R]:
    """Mark a function whose body is its definition.

    Args:
        body: the definition, differentiable, composed of torch's functions.

    Returns:
        The function, with the attributes of :class:`Defined`.
    """
    kernels: list[Kernel[R]] = []
    parameters = inspect.signature(body).parameters
    names = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> R:
        if kwargs or len(args) < len(names):
            given = {**defaults, **kwargs}
            try:
                args = (*args, *[given[name] for name in names[len(args) :]])
                kwargs = {n: v for n, v in kwargs.items() if n not in names}
            except KeyError:  # one is missing, as the definition says
                pass
        for kernel in kernels:
            if not kwargs and kernel.serves(*args):
                found = kernel.run(*args)
                if found is not NotImplemented:
                    return found
        return body(*args, **kwargs)

    function = cast(Any, call)
    function.definition, function.kernels = body, kernels
    return cast(Defined[P, R], function)


def add_kernel(
    function: Defined[P, R], name: str, serves: Callable[..., bool]
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add a kernel to a function, behind those that it has; a decorator.

    Args:
        function: marked by :func:`defined`.
        name: what the kernel is, for people.
        serves: whether it gives for some arguments what the definition gives; called with all of them, by position.
    """

    def add(run: Callable[..., R]) -> Callable[..., R]:
        function.kernels.append(Kernel(name, serves, run))
        return run

    return add
