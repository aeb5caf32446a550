"""Transformer layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.layers.attention_multihead import QuantMultiheadAttention
from qframework.layers.base import route_keywords
from qframework.layers.composite import QuantComposite, build_part
from qframework.layers.linear import QuantLinear
from qframework.proxy import ActQuantProxyFromInjector, build_proxy
from qframework.quantizers.none import NoneActQuant
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)

_NORM: Any = nn.LayerNorm
_PARTS = ("self_attn_", "linear1_", "linear2_", "norm1_", "norm2_")
_SUMS = ("residual1_", "residual2_", "output_")
_COMMON = ("weight_", "bias_", "input_")


class QuantTransformerEncoderLayer(QuantComposite, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` with quantized matrix products; its state dict loads.

    All its matrix products are quantized by default: those of the projections and the feed-forward layers, and the
    two of attention. Sums, norms and the result are float until they are given a quantizer.

    Keywords go from the whole to the part. ``weight_quant=``, ``weight_bit_width=``, ``input_...``, ``bias_...``
    are for all linear layers, the projections of attention included. A name of a part in front makes them that
    part's alone, and stronger: ``linear1_weight_bit_width=``, ``linear1_weight_quant=``,
    ``self_attn_in_proj_weight_bit_width=``, ``self_attn_q_scaled_quant=``. A part that is given a quantizer of its own
    takes none of the common keywords for that tensor.

        layer = QuantTransformerEncoderLayer(
            64, 4, weight_bit_width=4, self_attn_v_bit_width=4, residual1_quant=Int8ActPerTensorFloat
        )

    Several in ``torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)`` are a quantized encoder.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: as in
            torch.
        weight_quant: quantizer of the weights of all linear layers: a class or None.
        bias_quant: quantizer of their biases, likewise.
        input_quant: quantizer of their inputs, likewise. After a ReLU ``linear2`` takes the unsigned
            ``Uint8ActPerTensorFloat`` in place of the default.
        residual1_quant: quantizer of both operands of the sum after attention, which is then exact: a class, another
            layer's proxy to share, or None.
        residual2_quant: quantizer of both operands of the sum after the feed-forward layers, likewise.
        output_quant: quantizer of the result, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs ``output_quant``, or
            ``residual2_quant`` with ``norm_first``.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: arguments and names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``;
            ``self_attn_`` (then as for ``QuantMultiheadAttention``), ``linear1_``, ``linear2_`` (then as for
            ``QuantLinear``); ``residual1_``, ``residual2_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        ValueError: sizes that don't fit each other.
    """

    self_attn: QuantMultiheadAttention
    residual1_quant: ActQuantProxyFromInjector
    residual2_quant: ActQuantProxyFromInjector
    output_quant: ActQuantProxyFromInjector

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = Int32Bias,
        input_quant: Any = Int8ActPerTensorFloat,
        residual1_quant: Any = None,
        residual2_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        routed = route_keywords(self, kwargs, (*_PARTS, *_SUMS, *_COMMON))
        common = {
            "weight_": {"quant": weight_quant, **routed["weight_"]},
            "bias_": {"quant": bias_quant, **routed["bias_"]},
            "input_": {"quant": input_quant, **routed["input_"]},
        }
        hidden = dict(common)
        if _is_relu(activation) and input_quant is Int8ActPerTensorFloat:
            hidden["input_"] = {**common["input_"], "quant": Uint8ActPerTensorFloat}
        own = routed["self_attn_"]
        projections = {**_merged(common, own, "in_proj_"), **_merged(common, own, "out_proj_")}
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        norm_options = {**options, "eps": layer_norm_eps}
        self.self_attn = build_part(
            self,
            "self_attn",
            QuantMultiheadAttention,
            d_model,
            nhead,
            dropout=dropout,
            batch_first=batch_first,
            **options,
            **projections,
        )
        for name, sizes, names in (
            ("linear1", (d_model, dim_feedforward), common),
            ("linear2", (dim_feedforward, d_model), hidden),
        ):
            keywords = _merged(names, routed[f"{name}_"])
            layer = build_part(self, name, QuantLinear, *sizes, **options, **keywords)
            self.add_module(name, layer)
        for name in ("norm1", "norm2"):
            keywords = routed[f"{name}_"]
            self.add_module(
                name, build_part(self, name, _NORM, d_model, **norm_options, **keywords)
            )
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation = _activation(activation)
        self.activation_relu_or_gelu = 0  # torch's fused inference knows no quantizers
        self.return_quant_tensor = return_quant_tensor
        quantizers = (residual1_quant, residual2_quant, output_quant)
        for prefix, quantizer in zip(_SUMS, quantizers, strict=True):
            proxy = build_proxy(
                self,
                f"{prefix}quant",
                quantizer,
                NoneActQuant,
                routed[prefix],
                prefix,
                ActQuantProxyFromInjector,
                {"device": device, "dtype": dtype, "default_group_dim": -1},
            )
            self.add_module(f"{prefix}quant", proxy)

    def forward(  # type: ignore[override]
        self,
        src: Any,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Apply the layer.

        Args:
            src: float or quantized tensor ``(L, B, d_model)``, with ``batch_first`` ``(B, L, d_model)``, unbatched
                ``(L, d_model)``.
            src_mask: ``(L, L)`` or ``(B * nhead, L, L)``; bool (true: ignored) or float (added to the scores).
            src_key_padding_mask: ``(B, L)``, unbatched ``(L,)``; likewise.
            is_causal: says that ``src_mask`` is causal; without one, position ``i`` looks at 0 to ``i``.

        Returns:
            The result, in the shape of ``src``: a tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for that can't be had.
            TypeError: a mask that is neither bool nor float.
            ValueError: shapes that don't fit each other.
        """
        masks = (src_mask, src_key_padding_mask, is_causal)
        first, second = self.residual1_quant, self.residual2_quant
        if self.norm_first:
            x = first(src) + first(self._sa_block(self.norm1(src), *masks))
            x = second(x) + second(self._ff_block(self.norm2(x)))
        else:
            x = self.norm1(first(src) + first(self._sa_block(src, *masks)))
            x = self.norm2(second(x) + second(self._ff_block(x)))
        return self._pack(self.output_quant(x))

    def extra_repr(self) -> str:
        """The sizes, and what differs from the defaults."""
        parts = [
            f"d_model={self.self_attn.embed_dim}",
            f"nhead={self.self_attn.num_heads}",
            f"dim_feedforward={self.linear1.out_features}",
            "norm_first=True" if self.norm_first else "",
            super().extra_repr(),
        ]
        return ", ".join(filter(None, parts))

    def _remedy(self) -> str:
        return "Give output_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."


def _merged(
    common: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], layer: str = ""
) -> dict[str, Any]:
    """Keywords of a part: the common ones for tensors whose quantizer it keeps, then its own.

    Args:
        common: by tensor, ``{"weight_": {"quant": ..., "bit_width": 4}}``.
        own: of the part, as its constructor takes them.
        layer: prefix of the linear layer in that constructor.
    """
    merged = {
        f"{layer}{tensor}{name}": value
        for tensor, names in common.items()
        if f"{layer}{tensor}quant" not in own
        for name, value in names.items()
    }
    return {**merged, **own}


def _activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    known: dict[Any, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
    found = known.get(activation, activation) if isinstance(activation, str) else activation
    if not callable(found):
        raise ValueError(
            f"QuantTransformerEncoderLayer: activation must be 'relu', 'gelu' or a function, got {activation!r}"
        )
    return found


def _is_relu(activation: Any) -> bool:
    return activation in ("relu", F.relu, torch.relu) or isinstance(activation, nn.ReLU)
