"""Whether a difference is one that rounding errors account for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qframework.export.bounded import RULES, Bounded, elementwise, exact
from qframework.export.constants import Constants
from qframework.export.function_kinds import MOVES
from qframework.export.running import Runner, computed, function_name
from qframework.export.session import Call, Session


class Explanation(Runner):
    """Runs a program in float64, each quantizer's result being what someone else computed, and tells whose results are right.

    Args:
        program: with nodes for quantizers.
        session: with their calls.
        given: the results that someone computed, by the name of the call; where one is missing, that of the evaluation is taken.

    Attributes:
        right: for each call a mask of the elements that are, within rounding errors, those of the quantizer for what it was given.
        outputs: of the program, with bounds.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        session: Session,
        given: dict[str, Tensor],
    ) -> None:
        super().__init__(program, session)
        self.given, self.right = given, dict[str, Tensor]()
        self.outputs: list[Any] = []

    @torch.no_grad()
    def run(self) -> Explanation:
        """Run with the arguments of the session."""
        self.outputs = self.execute(self.session.args, self.session.kwargs)
        return self

    def held(self, t: Tensor) -> Any:
        """Parameters and inputs are exact."""
        return exact(t.detach().cpu())

    def quantizer(self, call: Call, x: Any) -> Any:
        """The given result; whether it is right is kept."""
        value = self.given.get(call.name)
        value = call.value if value is None else value.cpu()
        assert value is not None
        if x is not None:
            self.right[call.name] = _fits(call.constants, x, value)
        return exact(value)

    def function(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function by its rule."""
        name, u = function_name(node), _roundoff(node)
        parts = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Bounded)]
        if not parts or u is None or name in _CREATE:
            return _plain(node, args, kwargs)
        if name in RULES:
            return RULES[name](u, *args, **kwargs)
        if name in MOVES:
            return _moved(node, name, u, args, kwargs)
        return _any_function(node, u, args, kwargs)


#: Functions of the shape of their argument alone.
_CREATE = frozenset(
    [
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
    ]
)


def _roundoff(node: torch.fx.Node) -> float | None:
    """Half the distance from 1 to the next number, in the dtype of a node's result; None where it is no float."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return torch.finfo(value.dtype).eps / 2


def _values(x: Any) -> Any:
    return x.value if isinstance(x, Bounded) else x


def _plain(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    args, kwargs = pytree.tree_map(_values, (args, kwargs))
    return pytree.tree_map(exact, computed(node, args, kwargs))


def _moved(node: torch.fx.Node, name: str, u: float, args: Any, kwargs: Any) -> Any:
    def of(field: str) -> Any:
        def pick(x: Any) -> Any:
            if isinstance(x, Bounded):
                return getattr(x, field)
            if field == "error" and isinstance(x, float):
                return 0.0
            return x

        picked_args, picked_kwargs = pytree.tree_map(pick, (args, kwargs))
        return computed(node, picked_args, picked_kwargs)

    values, errors = of("value"), of("error")
    rounds = name in ("to", "_to_copy", "type_as")

    def joined(v: Any, e: Any) -> Any:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        return Bounded(v, e.abs() + (u * v.abs() if rounds else 0.0))

    return pytree.tree_map(joined, values, errors)


def _any_function(node: torch.fx.Node, u: float, args: Any, kwargs: Any) -> Any:
    """One without a rule: its own error as for functions of elements, what arguments bring by trying both signs of it."""
    if args and isinstance(args[0], Bounded):
        rest, options = pytree.tree_map(_values, (args[1:], kwargs))
        single = elementwise(lambda x, *a, **k: computed(node, (x, *a), k))
        if isinstance(node.meta.get("val"), Tensor):
            return single(u, args[0], *rest, **options)
    return _plain(node, args, kwargs)


def _fits(c: Constants, x: Any, value: Tensor) -> Tensor:
    """Where a value is that of a quantizer for ``x``, which may be off by its bound."""
    x = exact(x) if isinstance(x, Tensor) else x
    u = 2.0**-24 if c.scale.dtype is not torch.float64 else 2.0**-53
    if c.truncates is not None:
        return _fits_truncation(c, x, value)
    low, high = c.steps(x.value - x.error), c.steps(x.value + x.error)
    zero = c.spread(c.zero_point).double().abs() if not c.symmetric else 0.0
    slack = 4 * u * (torch.maximum(low.abs(), high.abs()) + zero)
    low, high = c.rounded(low - slack), c.rounded(high + slack)
    if c.format == "minifloat":
        codes = value.double() / c.spread(c.scale).double()
        margin = 1e-6 * codes.abs() + 1e-30
    else:
        codes = c.codes_of(value).double()
        margin = torch.full_like(codes, 0.01)
    same = (codes >= low - margin) & (codes <= high + margin)
    return same | (codes.isnan() & low.isnan())


def _fits_truncation(c: Constants, x: Bounded, value: Tensor) -> Tensor:
    assert c.truncates is not None
    scale = c.truncates[1].double()
    slack = x.error + 4 * 2.0**-24 * x.value.abs() + 1e-9 * scale.abs()
    low, high = (c.rounded(c.steps(t)) for t in (x.value - slack, x.value + slack))
    wide = value.double() / c.scale.double() + c.zero_point.double()
    return (wide >= low - 0.01) & (wide <= high + 0.01)
