"""Low-rank corrections: a small float product beside a quantized layer takes up part of its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.layer_wrappers import replace_module
from qframework.graph.parameters_in_use import why_fixed
from qframework.graph.reading_code import read_by_code
from qframework.graph.single_layers import is_single_layer, told
from qframework.graph.weight_writing import own_parameter
from qframework.layers.linear import QuantLinear
from qframework.quant_tensor import dequantize


class LowRankProduct(nn.Module):
    """``x @ down^T @ up^T``.

    Args:
        down: ``(rank, in_features)``.
        up: ``(out_features, rank)``.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.down.shape[1]}, {self.up.shape[0]}, rank={self.down.shape[0]}"

    def forward(self, input: Tensor) -> Tensor:
        """Of an input ``(..., in_features)``."""
        return input @ self.down.t() @ self.up.t()


class LowRankCorrected(nn.Module):
    """A quantized layer and the product that corrects it, added up.

    Attributes:
        layer: the quantized layer.
        correction: the product, on the float input.
    """

    def __init__(self, layer: nn.Module, correction: LowRankProduct) -> None:
        super().__init__()
        self.layer, self.correction = layer, correction

    def forward(self, input: Any) -> Any:
        """Both, of the same input."""
        value: Tensor = dequantize(input)
        return dequantize(self.layer(input)) + self.correction(value)


class LayerwiseLowRankCorrection:
    """SVDQuant's low-rank branch (Li 2024, https://arxiv.org/abs/2411.05007) beside each quantized linear layer.

    The weight's ``rank`` largest singular directions go into a float product, the rest is quantized; from the second iteration on
    the product takes those of what quantization left over. The best iterate is kept, so an error never grows.

    Args:
        model: with quantized linear layers; changed in place by :meth:`apply`.
        blacklist_layers: names of layers to leave alone.

    Attributes:
        names: of the layers that get one.
        skipped: from names of layers to why they get none.
    """

    def __init__(self, model: nn.Module, blacklist_layers: Sequence[str] | None = None) -> None:
        known = dict(model.named_modules())
        for name in blacklist_layers or ():
            if name not in known:
                raise ValueError(
                    f"LayerwiseLowRankCorrection: blacklist_layers names {name!r}, which the model doesn't have"
                )
        self.model = model
        self.layers = {
            n: m
            for n, m in known.items()
            if isinstance(m, QuantLinear)
            and m.weight_quant.is_quant_enabled
            and n not in (blacklist_layers or ())
        }
        in_code = read_by_code(model)
        why = {n: why_fixed(m, in_code) for n, m in self.layers.items()}
        self.skipped = {n: reason for n, reason in why.items() if reason is not None}
        self.layers = {n: m for n, m in self.layers.items() if n not in self.skipped}
        self.names = list(self.layers)
        if is_single_layer(model) and not self.names and not self.skipped:
            self.skipped[""] = told(model, "it has no quantized linear layer")

    @torch.no_grad()
    def apply(
        self, rank: int, iters: int = 1, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, Tensor]:
        """Put the products in.

        Args:
            rank: of the products, 1 or above.
            iters: iterations, 1 or above.
            dtype: of the arithmetic.

        Returns:
            The model, and for each layer ``||w - quantized - product|| / ||w||``, ``(layers,)``.

        Raises:
            ValueError: ``rank`` or ``iters`` below 1.
        """
        if rank < 1 or iters < 1:
            raise ValueError(
                f"LayerwiseLowRankCorrection: rank={rank} and iters={iters} must be 1 or above"
            )
        errors = torch.zeros(len(self.layers))
        model = self.model
        with unchanged_on_error(model):
            for i, layer in enumerate(self.layers.values()):
                made, errors[i] = corrected(layer, rank, iters, dtype)
                if layer is model:
                    model = made
                else:
                    replace_module(model, layer, made)
        return model, errors


def corrected(
    layer: QuantLinear, rank: int, iters: int, dtype: torch.dtype
) -> tuple[LowRankCorrected, Tensor]:
    """One layer with its product, and the relative error of its weight."""
    own_parameter(layer)
    whole = layer.weight.detach().clone().to(dtype)
    proxy = layer.weight_quant

    def quantized(weight: Tensor) -> Tensor:
        layer.weight.copy_(weight)
        proxy.reinitialize()
        return dequantize(layer.quant_weight()).to(dtype)  # type: ignore[no-any-return]

    zero = (whole.new_zeros(rank, whole.shape[1]), whole.new_zeros(whole.shape[0], rank))
    norm = whole.norm().clamp_min(torch.finfo(dtype).tiny)
    left = quantized(whole)
    best, factors, kept = (whole - left).norm() / norm, zero, whole
    residual = whole
    for _ in range(iters):
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        rank_here = min(rank, len(s))
        down, up = zero[0].clone(), zero[1].clone()
        down[:rank_here] = s[:rank_here, None] * v[:rank_here]
        up[:, :rank_here] = u[:, :rank_here]
        weight = whole - up @ down
        left = quantized(weight)
        error = (whole - left - up @ down).norm() / norm
        if error < best:
            best, factors, kept = error, (down, up), weight
        residual = whole - left
    quantized(kept)
    like = layer.weight
    product = LowRankProduct(*(f.to(like.dtype) for f in factors))
    product.train(layer.training)
    return LowRankCorrected(layer, product), best
