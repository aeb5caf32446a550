"""GPFQ: weights are rounded column by column, along the path that the float model's outputs take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qframework.graph import solvers
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.sequential import quantize_in_order
from qframework.graph.weight_grid import WeightGrid


class GPFQ:
    """Greedy path following (Zhang, Zhou, Saab 2023): how :class:`gpfq_mode` rounds a matrix.

    Subclasses may round otherwise: ``solve(weights, hessian, cross, grid, act_order)``, see :mod:`qframework.graph.solvers`. They may
    overwrite ``weights``; ``hessian`` and ``cross`` are no copies, and have to be as they were afterwards.
    """

    def solve(
        self, weights: Tensor, hessian: Tensor, cross: Tensor, grid: WeightGrid, act_order: bool
    ) -> Tensor:
        """The quantized matrix."""
        return solvers.gpfq(weights, hessian, cross, grid, act_order)


class gpfq_mode(LayerByLayer):
    """GPFQ (https://arxiv.org/abs/2201.11113), layer by layer; see :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    Each batch runs through the quantized model and through the float one: what a layer gets there, ``y`` and ``x``, gives
    ``H``, the mean of ``y y^T``, and ``G``, that of ``y x^T``.

    Args:
        model: with quantized layers, calibrated, in evaluation mode.
        algorithm_impl: :class:`GPFQ`, :class:`~qframework.graph.qronos.Qronos`, or a class with their ``solve``; an instance too.
        **options: see :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    Warns:
        UserWarning: at the end, layers that were left as they were, with the reason.
    """

    needs_float_inputs = True

    def __init__(
        self, model: nn.Module, *groups: Any, algorithm_impl: Any = GPFQ, **options: Any
    ) -> None:
        super().__init__(model, *groups, **options)
        self.algorithm = algorithm_impl() if isinstance(algorithm_impl, type) else algorithm_impl
        if not callable(getattr(self.algorithm, "solve", None)):
            raise TypeError(
                f"gpfq_mode: algorithm_impl={algorithm_impl!r} has no solve(weights, hessian, cross, grid, act_order); "
                "give GPFQ, Qronos, or a class with it"
            )

    def solve(self, weights: Tensor, statistics: InputStatistics, grid: WeightGrid) -> Tensor:
        """The quantized matrix."""
        h, g = statistics.hessian, statistics.cross
        return self.algorithm.solve(weights, h, g, grid, self.act_order)  # type: ignore[no-any-return]


def gpfq(model: nn.Module, batches: Any, **options: Any) -> gpfq_mode:
    """Quantize the weights of all layers by GPFQ, or another ``algorithm_impl``, in one call.

    Args:
        model: with quantized layers, calibrated; changed in place.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        **options: those of :class:`gpfq_mode`.

    Returns:
        The context that did it, with ``updated`` and ``failed``.
    """
    return quantize_in_order(gpfq_mode(model, **options), batches)
