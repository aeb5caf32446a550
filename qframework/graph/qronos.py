"""Qronos: the error that comes with a layer's inputs is corrected first, then that of rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qframework.graph import solvers
from qframework.graph.gpfq import GPFQ, gpfq, gpfq_mode
from qframework.graph.gptq import check_blocks
from qframework.graph.weight_grid import WeightGrid


class Qronos(GPFQ):
    """Qronos (2025, https://openreview.net/pdf?id=7axclBCYul), for ``gpfq_mode(algorithm_impl=Qronos)``.

    Args:
        num_blocks: 1 or above; the result doesn't depend on it, see :class:`~qframework.graph.gptq.gptq_mode`.
        alpha: of the largest eigenvalue of ``H``, added to its diagonal.
    """

    def __init__(self, num_blocks: int = 100, alpha: float = 1e-6) -> None:
        check_blocks(num_blocks, type(self).__name__)
        self.alpha = alpha

    def solve(
        self, weights: Tensor, hessian: Tensor, cross: Tensor, grid: WeightGrid, act_order: bool
    ) -> Tensor:
        """The quantized matrix."""
        return solvers.qronos(weights, hessian, cross, grid, act_order, self.alpha)


def qronos(model: nn.Module, batches: Any, **options: Any) -> gpfq_mode:
    """Quantize the weights of all layers by Qronos, in one call; arguments as for :func:`~qframework.graph.gpfq.gpfq`."""
    return gpfq(model, batches, **{"algorithm_impl": Qronos, **options})
