"""MagR: weights with smaller outliers, before they are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qframework.graph import solvers
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.layer_view import LayerView
from qframework.graph.sequential import quantize_in_order


class magr_mode(LayerByLayer):
    """MagR (Zhang 2024, https://arxiv.org/abs/2406.00800): a float model's weights with smaller largest magnitudes.

    Minimizes ``1/2 ||X (w - w0)||^2 + alpha' ||w||_inf`` for each output channel, so that outputs hardly change and a scale that
    covers all weights is smaller. It comes before quantization. One pass over the batches serves all layers, since they stay
    as they were for those behind them: ``update`` may be called once, or after each of ``num_layers`` passes.

    Args:
        model: float or quantized; quantizers of weights and activations are off meanwhile.
        alpha: weight of the largest magnitude, relative to the inputs' second moments.
        num_steps: of the proximal gradient descent.
        **options: see :class:`~qframework.graph.layer_by_layer.LayerByLayer`.

    Raises:
        ValueError: a negative ``alpha``, or ``num_steps`` below 1.
    """

    needs_quantized = False
    one_pass = True

    def __init__(
        self,
        model: nn.Module,
        *groups: Any,
        alpha: float = 0.1,
        num_steps: int = 10,
        **options: Any,
    ) -> None:
        if alpha < 0 or num_steps < 1:
            raise ValueError(
                f"magr_mode: alpha={alpha} must be 0 or above, num_steps={num_steps} 1 or above"
            )
        super().__init__(model, *groups, **options)
        self.alpha, self.num_steps = alpha, num_steps

    def _pass(self, args: Any, kwargs: Any, see: Any, quantized: bool) -> Any:
        return super()._pass(args, kwargs, see, quantized=False)

    def _comes(self, layer: nn.Module) -> bool:
        self._turn.add(layer)
        return True

    def _see(self, layer: nn.Module, x: Any, is_float: bool) -> None:
        ends, self.return_forward_output = self.return_forward_output, True
        try:
            super()._see(layer, x, is_float)
        finally:
            self.return_forward_output = ends

    def change(self, layer: nn.Module, collected: Callable[[], InputStatistics]) -> bool:
        """Give a layer its new float weight."""
        view, weight = LayerView(layer), layer._parameters["weight"]
        assert weight is not None
        statistics = collected()
        where = statistics.device
        matrix = view.to_matrix(weight.detach()).to(where, self.dtype)
        found = solvers.magr(matrix, statistics.hessian, self.alpha, self.num_steps)
        if not bool(torch.isfinite(found).all()):
            raise solvers.NotSolvable("the result isn't finite; give more samples")
        weight.copy_(view.from_matrix(found.to(weight.device)))
        return True


def magr(model: nn.Module, batches: Any, **options: Any) -> magr_mode:
    """Apply MagR to all layers of a model, in one call.

    Args:
        model: float; changed in place.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        **options: those of :class:`magr_mode`.

    Returns:
        The context that did it, with ``updated`` and ``failed``.
    """
    return quantize_in_order(magr_mode(model, **options), batches)
