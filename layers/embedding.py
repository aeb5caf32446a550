"""Tables of quantized rows."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.layers.base import route_keywords
from qframework.layers.wbiol import QuantWeightLayer
from qframework.proxy import Quantizer, WeightQuantProxyFromInjector, build_proxy
from qframework.quant_tensor import dequantize
from qframework.quantizers.none import NoneWeightQuant
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class _QuantTable(QuantWeightLayer):
    sparse: bool

    def _init_table(
        self, weight_quant: Quantizer, return_quant_tensor: bool, keywords: dict[str, Any]
    ) -> None:
        """The last step of a constructor."""
        self.return_quant_tensor = return_quant_tensor
        routed = route_keywords(self, keywords, ("weight_",))
        self.weight_quant = build_proxy(  # type: ignore[assignment]
            self,
            "weight_quant",
            weight_quant,
            NoneWeightQuant,
            routed["weight_"],
            "weight_",
            WeightQuantProxyFromInjector,
        )

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, *args: Any, **kwargs: Any
    ) -> Self:
        """A layer with these rows.

        Args:
            embeddings: ``(num_embeddings, embedding_dim)``; the layer's parameter shares their memory.
            freeze: don't train them.
            *args: of the constructor, behind ``embedding_dim``.
            **kwargs: of the constructor.

        Raises:
            ValueError: ``embeddings`` has another number of axes.
        """
        if embeddings.dim() != 2:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: embeddings must have two axes, rows and features; got the shape {tuple(embeddings.shape)}"
            )
        layer = cls(*embeddings.shape, *args, _weight=embeddings, **kwargs)
        layer.weight.requires_grad_(not freeze)
        return layer

    @property
    def _sparse_gradient(self) -> bool:
        """Whether the table's gradient may be sparse; that of a quantizer has all elements."""
        return self.sparse and not self.weight_quant.is_quant_enabled

    def _remedy(self) -> str:
        return "Give weight_quant=Int8WeightPerTensorFloat, or return_quant_tensor=False."


class QuantEmbedding(_QuantTable, nn.Embedding):
    """``torch.nn.Embedding`` with a quantized table.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight: as in
            torch; ``max_norm`` rescales the quantized rows, which are floats then, and the gradient is ``sparse`` only
            where the table isn't quantized.
        weight_quant: quantizer of the table: a class, another layer's proxy to share, or None. Its channels are
            the rows.
        return_quant_tensor: return a quantized tensor, which needs one scale for the table.
        device: of the table.
        dtype: of the parameters.
        **kwargs: names to bind anew in the quantizer, prefixed ``weight_``.

    Raises:
        QuantizerError: the quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self._init_table(weight_quant, return_quant_tensor, kwargs)

    def forward(self, input: Tensor) -> Any:
        """Look up rows.

        Args:
            input: integer tensor of any shape.

        Returns:
            A tensor with one more axis, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for, and the table isn't quantized by one scale.
        """
        table = self.quant_weight()
        table = table if self.return_quant_tensor else dequantize(table)
        if self.max_norm is not None:  # torch rescales rows in place
            table = dequantize(table).clone()
        return self._pack(
            F.embedding(
                input,
                table,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self._sparse_gradient,
            )
        )


class QuantEmbeddingBag(_QuantTable, nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with a quantized table; the result is a float tensor.

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, _weight, include_last_offset, padding_idx:
            as in torch; the gradient is ``sparse`` only where the table isn't quantized.
        weight_quant: quantizer of the table: a class, another layer's proxy to share, or None. Its channels are
            the rows.
        device: of the table.
        dtype: of the parameters.
        **kwargs: names to bind anew in the quantizer, prefixed ``weight_``.

    Raises:
        QuantizerError: the quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.EmbeddingBag.__init__(
            self,
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device=device,
            dtype=dtype,
        )
        self._init_table(weight_quant, False, kwargs)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Sum, mean or maximum of rows for each bag; arguments and result as in torch."""
        table = dequantize(self.quant_weight())
        if self.max_norm is not None:  # torch rescales rows in place
            table = table.clone()
        return F.embedding_bag(
            input,
            table,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self._sparse_gradient,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
