"""How a quantizer runs, and what is read of its parts to find that out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qframework.configuration import settings
from qframework.core.base import NotStated
from qframework.functional import ROUNDINGS, IntegerGrid
from qframework.kernels import native
from qframework.kernels.autograd import (
    may_fuse,
    may_fuse_in_graph,
    safe_from_writes,
)
from qframework.kernels.guards import Guards
from qframework.kernels.trust import (
    distrust,
    distrust_all,
    function_names,
    giver_of,
    is_plain,
    modes_active,
)

#: From values, and for some quantizers a scale, to what the quantizer returns.
Form = Callable[..., Any]


class Reader:
    """Reads the rules of parts, and remembers what they depend on.

    Args:
        guards: remember the parts; None under a compiler, which has guards of its own.
    """

    def __init__(self, guards: Guards | None = None) -> None:
        self.guards = guards
        reason = distrust_all()
        if reason is not None:
            raise NotStated(reason)

    def stated(self, part: nn.Module, *args: Any) -> Any:
        """The rule of a part.

        Args:
            part: of a quantizer.
            *args: what its ``rule`` takes besides.

        Raises:
            NotStated: there is none, or it isn't what the part computes.
        """
        return self.read(part, "rule", *args)

    def read(self, part: nn.Module, method: str, *args: Any) -> Any:
        """What a method states, see :meth:`stated`."""
        if not isinstance(part, nn.Module):
            raise NotStated(f"{getattr(part, '__name__', type(part).__name__)} is no module")
        if self.guards is not None:
            self.guards.watch(part)
        else:
            for name in function_names(type(part)):  # looked at, so that a compiler watches it
                getattr(part, name)
        reason = distrust(part, method)
        if reason is not None:
            raise NotStated(reason)
        if self.guards is not None:
            self.guards.watch_settings(part)
        try:
            return getattr(part, method)(self.stated, *args)
        except NotStated:
            raise
        except Exception as error:
            given_by = giver_of(type(part), method).__module__
            if given_by.startswith("qframework.") and isinstance(error, (TypeError, ValueError)):
                raise  # what the part holds isn't allowed
            # A class that knows nothing of rules may have a method of that name.
            raise NotStated(f"{type(part).__name__}.{method} is no rule: {error}") from error


def known_rounding(rounding: Any) -> None:
    """Refuse a rounding that only the composition knows."""
    if rounding not in ROUNDINGS:
        raise NotStated(f"no faster form rounds by {rounding!r}")


class Plan:
    """How a quantizer runs.

    Attributes:
        name: of the function that computes, for people; ``'composed'`` where the quantizer itself is called.
        reason: why it is called itself, else empty.
        grid: the integers, where values by a scale that is known are those of
            :func:`~qframework.functional.fake_quantize`, else None.
        symmetric: whether there is no zero point.
        format: of minifloats, their rounding and whether the clamp is differentiated; else empty.
        fuses_relu: whether the form does what the activation function would do, a ReLU.
        guards: what holds as long as the plan does; None under a compiler.
    """

    def __init__(self, quantizer: Any, activation: nn.Module | None, guards: Guards | None) -> None:
        self.quantizer, self.activation, self.guards = quantizer, activation, guards
        self.form: Form | None = None
        self.fuses_relu = False
        self.name, self.reason = "composed", ""
        self.grid: IntegerGrid | None = None
        self.symmetric = False
        self.format: tuple[Any, ...] = ()

    def holds(self, quantizer: Any, activation: nn.Module | None) -> bool:
        """Whether it still is the plan of a quantizer, behind an activation function."""
        return (
            self.quantizer is quantizer
            and self.activation is activation
            and self.guards is not None
            and self.guards.hold()
        )

    def run(self, x: Tensor, *scales: Tensor) -> Any:
        """What the quantizer returns for what the activation function makes of ``x``.

        Args:
            x: floating-point values.
            *scales: what the quantizer takes besides.
        """
        fast = (
            self.form is not None
            and ((may_fuse() and not modes_active()) or may_fuse_in_graph())
            and is_plain(x, *scales)
        )
        if self.activation is not None and not (fast and self.fuses_relu):
            x = self.activation(x)
        if fast:
            if self.fuses_relu and x.requires_grad:
                x = safe_from_writes(x)
            return self.form(x, *scales)  # type: ignore[misc]
        return self.quantizer(x, *scales)

    def path(self, x: Tensor | None = None) -> str:
        """Which form runs, for people: ``'C++ function'``, ``'fused'`` or ``'composed'``, of which function, and why.

        Args:
            x: for these values; None for any.
        """
        if settings.kernels == "reference":
            return "composed: settings.kernels is 'reference'"
        if self.form is None:
            return f"composed: {self.reason}"
        if settings.kernels == "auto" and native.available():
            if x is None:
                least = native.tensors.SMALLEST
                return f"C++ function from {least:,} elements on, else fused: {self.name}"
            if native.serves(x.detach(), (), "round") is not None:
                return f"C++ function: {self.name}"
        return f"fused: {self.name}"
