"""What functions of a whole sequence share: quantizers whose scale is known, applied in place, and their gradients.

A recurrent cell works on few numbers at a time, so that calls cost more than arithmetic. A step writes into memory that
is there already. What a step's gradient is multiplied by is computed for all steps at once, so that the loop back through
time is a matrix product and a few multiplications a step; so are the gradients of scales, after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.functional import ROUNDINGS, IntegerGrid, Range
from qframework.kernels.autograd import apply, is_compiling, may_fuse, transforms_active
from qframework.kernels.integer import sum_to


def refuse_other_gradients(grad: Tensor) -> None:
    """Refuse several gradients at once, which can't be written in place, and a graph of the gradient.

    Raises:
        RuntimeError: with the remedy.
    """
    if is_compiling():
        return
    if torch.is_grad_enabled():
        what = "has no second derivative (create_graph=True)"
    elif transforms_active(grad):
        what = "takes one gradient at a time: call it for each gradient (is_grads_batched=False)"
    else:
        return
    raise RuntimeError(
        f"a recurrent layer's function of a whole sequence {what}; or run the layer under "
        "qframework.settings.use(kernels='reference')"
    )


class _Nothing:
    """Stands for a context where nothing is saved."""


def call(function: type[Function], ranges: Any, *operands: Any) -> Any:
    """Call a function of a sequence; it is given whether to save what gradients need, and the ranges taken apart."""
    scales = [None if r is None else r.scale for r in ranges]
    grids = tuple(None if r is None else r.grid for r in ranges)
    saves = torch.is_grad_enabled()
    given = (*operands, saves, grids, *scales)
    return apply(function, *given) if saves else function.forward(_Nothing(), *given)


def together(kind: Any, scales: Any, grids: Any) -> Any:
    """Ranges that :func:`call` took apart."""
    parts = zip(scales, grids, strict=True)
    return kind(*(None if grid is None else Range(scale, grid) for scale, grid in parts))


def takes_sequences(products: Tensor, *others: Tensor) -> bool:
    """Whether functions of a sequence compute in this type; half precision rounds after each operation."""
    return products.dtype in (torch.float32, torch.float64) and all(
        t.dtype == products.dtype for t in others
    )


def serves(products: Tensor, *others: Tensor) -> bool:
    """Whether functions of a sequence may run in eager mode."""
    return may_fuse() and takes_sequences(products, *others)


#: Quantizes its first operand into its last; the second, which may be either, is overwritten.
Writer = Callable[[Tensor, Tensor, Tensor], Tensor]


def writer(found: Range | None) -> Writer:
    """The function that quantizes by a range."""
    if found is None:
        return lambda x, work, out: x if out is x else out.copy_(x)
    scale, grid = found
    low, high, rule = _bounds(grid)
    if rule == "round":
        return lambda x, work, out: torch.mul(
            torch.div(x, scale, out=work).round_().clamp_(low, high), scale, out=out
        )
    rounding = ROUNDINGS[rule]
    return lambda x, work, out: torch.mul(
        rounding(torch.div(x, scale, out=work)).clamp_(low, high), scale, out=out
    )


def _bounds(grid: IntegerGrid) -> tuple[Any, Any, str]:
    return grid.minimum, grid.maximum, grid.rounding


def writer_of_columns(parts: list[tuple[Range | None, int]]) -> Writer:
    """The same for neighbouring columns with a quantizer each.

    Args:
        parts: quantizers and the columns of each, in order.
    """
    found = [r for r, _ in parts if r is not None]
    if len(found) == len(parts) and len({r.grid.rounding for r in found}) == 1:
        like = found[0].scale
        scale, low, high = (
            torch.cat([_number(r, name, like).expand(n) for r, n in parts if r is not None])
            for name in ("scale", "minimum", "maximum")
        )
        return writer(Range(scale, IntegerGrid(low, high, found[0].grid.rounding)))
    writers = [(writer(r), n) for r, n in parts]

    def write(x: Tensor, work: Tensor, out: Tensor) -> Tensor:
        start = 0
        for quantize, n in writers:
            quantize(*(t[..., start : start + n] for t in (x, work, out)))
            start += n
        return out

    return write


def _number(found: Range, name: str, like: Tensor) -> Tensor:
    """The scale, the smallest or the largest integer of a range."""
    if name == "scale":
        return found.scale
    bound = getattr(found.grid, name)
    return bound if isinstance(bound, Tensor) else like.new_tensor(bound)


def plainly(x: Tensor, found: Range | None) -> Tensor:
    """The quantized values, written nowhere else."""
    if found is None:
        return x
    scale, grid = found
    low, high, rule = _bounds(grid)
    return torch.clamp(ROUNDINGS[rule](x / scale), low, high) * scale


class Derivatives(NamedTuple):
    """What the result of a quantizer changes by, element by element.

    Attributes:
        by_value: for its operand; None is 1.
        by_scale: for its scale; None where that isn't needed.
    """

    by_value: Tensor | None
    by_scale: Tensor | None

    def through(self, factor: Tensor, last: bool = True) -> Tensor:
        """A factor of a gradient behind the quantizer, in front of it.

        Args:
            factor: it stays as it is.
            last: there is no further call, and the result may take the memory of the derivatives.
        """
        if self.by_value is None:
            return factor.clone() if last else factor
        return self.by_value.mul_(factor) if last else self.by_value * factor


def differentiated(x: Tensor, found: Range | None, needed: bool) -> tuple[Tensor, Derivatives]:
    """The quantized values of all steps, and what they change by."""
    if found is None:
        return x, Derivatives(None, None)
    value, *changes = _derivatives(x, found.scale, found.grid, need_scale=needed)
    return value, Derivatives(*changes)


def scale_gradient(
    of: Derivatives, found: Range | None, *factors: Tensor | tuple[int, Tensor]
) -> Tensor | None:
    """The gradient of a scale, None where it isn't needed.

    Args:
        of: the derivatives, whose memory is used.
        found: the quantizer.
        *factors: of the gradient of its result; those of a number of blocks of columns with that number.
    """
    if of.by_scale is None or found is None:
        return None
    product = of.by_scale
    start = 0
    for factor in factors:
        if isinstance(factor, Tensor):
            product = product.mul_(factor)
            continue
        blocks, same = factor
        columns = blocks * same.shape[-1]
        part = product[..., start : start + columns].unflatten(-1, (blocks, same.shape[-1]))
        part.mul_(same.unsqueeze(-2))
        start += columns
    return sum_to(product, found.scale)


def before_sigmoid(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient in front of a sigmoid, in the memory of that behind it."""
    return torch.ops.aten.sigmoid_backward.grad_input(grad, result, grad_input=grad)  # type: ignore[no-any-return]


def before_tanh(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient in front of a hyperbolic tangent, in the memory of that behind it."""
    return torch.ops.aten.tanh_backward.grad_input(grad, result, grad_input=grad)  # type: ignore[no-any-return]


def before_relu(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient in front of a ReLU, in the memory of that behind it."""
    return torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)  # type: ignore[no-any-return]


def before(states: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The state that each step starts from.

    Args:
        states: after each step, ``(T, N, H)``.
        first: before the first one, ``(N, H)``.
        reverse: whether the last step is taken first.
    """
    start = first.unsqueeze(0)
    return torch.cat([states[1:], start]) if reverse else torch.cat([start, states[:-1]])


def weight_gradient(states: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weights ``(H, columns)`` that all steps multiply their state by."""
    return states.flatten(0, 1).t() @ grad.flatten(0, 1)


def _derivatives(
    x: Tensor,
    scale: Tensor,
    grid: IntegerGrid,
    *,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``fake_quantize``, and what it changes by, element by element, for ``x`` (None is 1) and for the scale."""
    # Memory is used again where it can be: new pages cost more than the arithmetic.
    exact = x / scale
    minimum, maximum, rounding = _bounds(grid)
    place = ROUNDINGS[rounding](exact)
    by_x = None
    if grid.clamp_gradient and not isinstance(minimum, Tensor):
        inside, bounds = torch.ops.aten.hardtanh_backward, (minimum - 0.5, maximum + 0.5)
        by_x = inside(torch.ones_like(place), place, *bounds)
        inside.grad_input(exact, place, *bounds, grad_input=exact)
        q = place.clamp_(minimum, maximum)
    else:
        q = torch.clamp(place, minimum, maximum)
        if grid.clamp_gradient:
            by_x = q.eq(place).to(place.dtype)
            exact = torch.where(by_x > 0, exact, 0.0)
    by_scale = torch.sub(q, exact, out=exact) if need_scale else None
    return q.mul_(scale), by_x, by_scale
