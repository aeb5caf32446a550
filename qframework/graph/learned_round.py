"""Learned rounding: whether each weight is rounded up or down is learned from the outputs of its layer, or of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.batches import Batches
from qframework.graph.block_rounding import round_blocks
from qframework.graph.in_place import strips
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.rounding_objective import OutputError, flip_while_better
from qframework.graph.sequential import quantize_in_order
from qframework.graph.soft_rounding import METHODS
from qframework.graph.weight_grid import WeightGrid

#: Above it, the columns of a layer aren't gone over one by one at the end.
_COLUMNS_TO_FLIP = 8192
#: Rows whose rounding is learned together, at least.
_ROWS = 128


class learned_round_mode(LayerByLayer):
    """Learned rounding by layer, as a context; see :func:`learned_round` and :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    Args:
        model: with quantized layers, calibrated, in evaluation mode.
        method: ``"adaround"`` or ``"autoround"``.
        steps: of the descent.
        lr: step size; None for that of the method.
        **options: see ``LayerByLayer``.
    """

    needs_float_inputs = True

    def __init__(
        self,
        model: nn.Module,
        *groups: Any,
        method: str = "adaround",
        steps: int = 1000,
        lr: float | None = None,
        **options: Any,
    ) -> None:
        check_method(method, steps, lr)
        super().__init__(model, *groups, **options)
        self.method, self.steps, self.lr = method, steps, lr

    def solve(self, weights: Tensor, statistics: InputStatistics, grid: WeightGrid) -> Tensor:
        """The quantized matrix; rows are independent, so that a large one is gone through in strips of them."""
        for rows in strips(weights.shape[2], weights.shape[0] * weights.shape[1], _ROWS):
            part = weights[:, :, rows].contiguous()
            weights[:, :, rows] = self._solve(
                part, OutputError(part, statistics), grid.of_rows(rows)
            )
        return weights

    def _solve(self, weights: Tensor, error: OutputError, grid: WeightGrid) -> Tensor:
        below, above = grid.neighbours(weights)
        best = _Best(grid.nearest(weights), error)
        with torch.enable_grad():
            _learn(self.method, self.steps, self.lr, weights, below, above, best)
        if weights.shape[1] <= _COLUMNS_TO_FLIP:
            other = torch.where(best.rows == below, above, below)
            best.take(flip_while_better(best.rows, other, error)[0])
        return best.rows


def check_method(method: str, steps: int, lr: float | None) -> None:
    """Refuse options that can't be."""
    if method not in METHODS:
        raise ValueError(
            f"learned_round: method={method!r}; allowed: {', '.join(map(repr, METHODS))}"
        )
    if steps < 1 or (lr is not None and lr <= 0):
        raise ValueError(f"learned_round: steps={steps} must be 1 or above, lr={lr} above 0")


class _Best:
    """For each row of a matrix the values with the least error, the first of equals."""

    def __init__(self, first: Tensor, error: OutputError) -> None:
        self.rows, self.error = first, error
        self.least = error.of_rows(first)

    @torch.no_grad()
    def take(self, found: Tensor) -> None:
        """Take the rows that are better than those before."""
        now = self.error.of_rows(found)
        better = now < self.least
        self.rows = torch.where(better, found, self.rows)
        self.least = torch.where(better, now, self.least)


def _learn(
    method: str,
    steps: int,
    lr: float | None,
    weights: Tensor,
    below: Tensor,
    above: Tensor,
    best: _Best,
) -> None:
    """A descent; hard roundings along the way are offered to ``best``."""
    error = best.error
    rounding = METHODS[method](weights, below, above)
    optimizer = rounding.optimizer(lr, steps)
    diagonal = error.hessian.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    typical = ((above - below).square() * diagonal).mean().clamp_min(1e-30) / 12
    for step in range(steps):
        q = rounding.soft()
        # The gradient of the error, known in closed form, over that of a typical rounding error.
        gradient = error.slope(q.detach()).div_(typical)
        penalty = rounding.penalty(step / steps)
        optimizer.zero_grad()
        if isinstance(penalty, Tensor):
            penalty.backward()  # type: ignore[no-untyped-call]
        if q.requires_grad:
            q.backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        rounding.bound()
        if (step + 1) % max(steps // 8, 1) == 0 or step + 1 == steps:
            best.take(rounding.hard())


def learned_round(
    model: nn.Module,
    batches: Any,
    blocks: Sequence[str] | str | None = None,
    method: str = "adaround",
    steps: int = 1000,
    lr: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Learn for each weight whether it is rounded up or down; the result is at most one step from the float weight, within the range.

    By layer (``blocks=None``), outputs on the quantized model's inputs are to be those of the float model on its own. Since a layer's
    error is a quadratic function of its weights, the second moments of the inputs stand for the samples; at the end single weights
    are exchanged where that lowers the error. By block, samples run through the block, its activations in between as they are
    quantized. Of all iterates the best one is kept; a layer or block never ends worse than with nearest values.

    - ``"adaround"`` (Nagel 2020, https://arxiv.org/abs/2004.10568): rectified sigmoids and a penalty that drives them to 0 and 1.
    - ``"autoround"`` (Cheng 2023, https://arxiv.org/abs/2309.05516): offsets within half a step, by the sign of the gradient.
    - blocks are BRECQ's (Li 2021, https://arxiv.org/abs/2102.05426).

    Args:
        model: with quantized layers, calibrated, in evaluation mode; changed in place.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        blocks: names of modules that are learned as one, ``"auto"`` for the parts of a model's ``nn.Sequential`` and ``nn.ModuleList``
            modules; None for layers.
        method: ``"adaround"`` or ``"autoround"``.
        steps: of each descent.
        lr: step size; None for 1e-2 (AdaRound) and ``1 / steps`` (AutoRound).
        batch_size: samples of a step by block.
        seed: of their choice.
        **options: by layer, those of :class:`learned_round_mode`.

    Returns:
        The context that did it, with ``updated``, ``failed`` and ``errors``.

    Raises:
        ValueError: an unknown method or block, or another number that can't be.
    """
    check_method(method, steps, lr)
    if blocks is None:
        mode = learned_round_mode(
            model, method=method, steps=steps, lr=lr, **{"measure": True, **options}
        )
        return quantize_in_order(mode, batches)
    return round_blocks(model, Batches(batches), blocks, method, steps, lr, batch_size, seed)


__all__ = ["learned_round", "learned_round_mode"]
