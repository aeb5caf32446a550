"""GPTQ: weights are rounded column by column, each one's error taken up by the columns that follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qframework.graph import solvers
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.sequential import quantize_in_order
from qframework.graph.weight_grid import WeightGrid


class gptq_mode(LayerByLayer):
    """GPTQ (Frantar 2022, https://arxiv.org/abs/2210.17323), layer by layer; see :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    ``H`` is the mean of ``2 x x^T`` over all samples, with 1 % of its mean diagonal added to the diagonal; ``u`` the upper Cholesky
    factor of its inverse. Column ``i`` becomes ``q_i = nearest(w_i)``, and ``w_j -= (w_i - q_i) / u_ii * u_ij`` for those behind it.

    Args:
        model: with quantized layers, calibrated, in evaluation mode.
        num_blocks: 1 or above; taken for programs that give it. Columns are worked on in blocks of a fixed size, so that the
            result doesn't depend on it.
        **options: see :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    Raises:
        ValueError: ``num_blocks`` below 1.

    Warns:
        UserWarning: at the end, layers that were left as they were, with the reason.
    """

    def __init__(
        self, model: nn.Module, *groups: Any, num_blocks: int = 100, **options: Any
    ) -> None:
        check_blocks(num_blocks, type(self).__name__)
        super().__init__(model, *groups, **options)

    def solve(self, weights: Tensor, statistics: InputStatistics, grid: WeightGrid) -> Tensor:
        """The quantized matrix."""
        return solvers.gptq(weights, statistics.hessian, grid, self.act_order)


def check_blocks(num_blocks: int, who: str) -> None:
    """Refuse a number of blocks below 1."""
    if not isinstance(num_blocks, int) or num_blocks < 1:
        raise ValueError(f"{who}: num_blocks={num_blocks!r} must be an integer of 1 or above")


def gptq(model: nn.Module, batches: Any, **options: Any) -> gptq_mode:
    """Quantize the weights of all layers by GPTQ, in one call.

    Args:
        model: with quantized layers, calibrated; changed in place.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        **options: those of :class:`gptq_mode`.

    Returns:
        The context that did it, with ``updated`` and ``failed``.
    """
    return quantize_in_order(gptq_mode(model, **options), batches)
