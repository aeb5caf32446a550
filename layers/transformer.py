"""Transformer layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.layers.attention_keywords import OF_ENCODER, operand_keywords
from qframework.layers.attention_multihead import QuantMultiheadAttention
from qframework.layers.base import route_keywords
from qframework.layers.composite import QuantComposite, build_part
from qframework.layers.eltwise import QuantEltwiseAdd
from qframework.layers.linear import QuantLinear
from qframework.layers.norm import QuantLayerNorm
from qframework.proxy import Quantizer
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)

_PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2", "residual1", "residual2")
_COMMON = ("weight_", "bias_", "input_", "act_")


class QuantTransformerEncoderLayer(QuantComposite, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` with quantized matrix products; its state dict loads.

    All its matrix products are quantized by default: those of the projections and the feed-forward layers, and the
    two of attention. Residual sums and norms are float until they are given a quantizer.

    Keywords go from the whole to the part. ``weight_quant=``, ``weight_bit_width=``, ``input_...``, ``bias_...``
    are for all linear layers, the projections of attention included; ``act_quant=``, ``act_...`` for the operands of
    attention's two products, its weights without a sign. ``input_collect_stats_steps`` and ``input_quant_delay_steps`` are for
    those operands too, where no ``act_...`` says otherwise. The name of a part in front makes them that
    part's alone, and stronger: ``linear1_weight_bit_width=``, ``self_attn_in_proj_weight_bit_width=``,
    ``residual1_input_quant=``. A part that is given a quantizer of its own takes none of the common keywords for
    that tensor. Parts are ``self_attn`` (:class:`QuantMultiheadAttention`), ``linear1``, ``linear2``
    (:class:`QuantLinear`), ``norm1``, ``norm2`` (:class:`QuantLayerNorm`), ``residual1``, ``residual2``
    (:class:`QuantEltwiseAdd`, its ``input_quant`` for both operands).

    ::

        layer = QuantTransformerEncoderLayer(
            64, 4, weight_bit_width=4, self_attn_v_bit_width=4, residual1_input_quant=Int8ActPerTensorFloat
        )

    Several in ``torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)`` are a quantized encoder.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias:
            as in torch.
        weight_quant: quantizer of the weights of all linear layers: a class or None.
        bias_quant: quantizer of their biases: a class, a proxy to share, or None.
        input_quant: quantizer of their inputs: a class, a proxy to share, or None. After a ReLU ``linear2`` takes the unsigned
            ``Uint8ActPerTensorFloat`` in place of the default.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs ``norm2_output_quant``, or with
            ``norm_first`` ``residual2_output_quant`` or ``residual2_input_quant``.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: for all linear layers, prefixed ``weight_``, ``bias_``, ``input_``; for the operands of attention, prefixed
            ``act_``, ``act_quant`` among them; for a part, prefixed by its name
            and an underscore, as its own constructor takes them.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        ValueError: sizes that don't fit each other.
    """

    prefixes_for = OF_ENCODER
    self_attn: QuantMultiheadAttention
    residual1: QuantEltwiseAdd
    residual2: QuantEltwiseAdd

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
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = Int32Bias,
        input_quant: Quantizer = Int8ActPerTensorFloat,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.norm_first = norm_first
        routed = route_keywords(self, kwargs, (*(f"{part}_" for part in _PARTS), *_COMMON))
        common = {
            "weight_": {"quant": weight_quant, **routed["weight_"]},
            "bias_": {"quant": bias_quant, **routed["bias_"]},
            "input_": {"quant": input_quant, **routed["input_"]},
        }
        hidden = dict(common)
        if _is_relu(activation) and input_quant is Int8ActPerTensorFloat:
            hidden["input_"] = {**common["input_"], "quant": Uint8ActPerTensorFloat}

        def build(part: str, layer: Any, *sizes: int, **options: Any) -> None:
            options.update(routed[f"{part}_"])
            if part == self._last and return_quant_tensor:
                options["return_quant_tensor"] = True
            self.add_module(part, build_part(self, part, layer, *sizes, **options))

        place: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"bias": bias, **place}
        own = routed["self_attn_"]
        heads = {"dropout": dropout, "batch_first": batch_first, **options}
        heads |= {**_merged(common, own, "in_proj_"), **_merged(common, own, "out_proj_")}
        heads |= operand_keywords(routed["act_"], routed["input_"], own)
        build("self_attn", QuantMultiheadAttention, d_model, nhead, **heads)
        first = _merged(common, routed["linear1_"])
        build("linear1", QuantLinear, d_model, dim_feedforward, **options, **first)
        second = _merged(hidden, routed["linear2_"])
        build("linear2", QuantLinear, dim_feedforward, d_model, **options, **second)
        for name in ("norm1", "norm2"):
            build(name, QuantLayerNorm, d_model, eps=layer_norm_eps, weight_quant=None, **options)
        for name in ("residual1", "residual2"):
            build(name, QuantEltwiseAdd, input_quant=None, output_quant=None)
            self.get_submodule(name).to(**place)
        self.dropout = nn.Dropout(dropout)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation = _activation(activation)
        self.activation_relu_or_gelu = 0  # torch's fused inference knows no quantizers

    @property
    def _last(self) -> str:
        """The part that gives the result."""
        return "residual2" if self.norm_first else "norm2"

    @property
    def return_quant_tensor(self) -> bool:  # type: ignore[override]
        """Whether the result is a quantized tensor."""
        return bool(self.get_submodule(self._last).return_quant_tensor)

    @return_quant_tensor.setter
    def return_quant_tensor(self, value: bool) -> None:
        self.get_submodule(self._last).return_quant_tensor = value  # type: ignore[assignment]

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
            src_key_padding_mask: ``(B, L)``, unbatched ``(L,)``; True where a key is left out.
            is_causal: says that ``src_mask`` is causal; without one, position ``i`` looks at 0 to ``i``.

        Returns:
            The result, in the shape of ``src``: a tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for that can't be had.
            TypeError: a mask that is neither bool nor float.
            ValueError: shapes that don't fit each other.
        """
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = self.residual1(src, self._sa_block(self.norm1(src), *masks))
            return self.residual2(x, self._ff_block(self.norm2(x)))
        x = self.norm1(self.residual1(src, self._sa_block(src, *masks)))
        return self.norm2(self.residual2(x, self._ff_block(x)))

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


def _merged(
    common: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], layer: str = ""
) -> dict[str, Any]:
    """The common keywords that a part takes: those for tensors whose quantizer it keeps.

    Args:
        common: by tensor, ``{"weight_": {"quant": ..., "bit_width": 4}}``.
        own: of the part, as its constructor takes them.
        layer: prefix of the linear layer in that constructor.
    """
    return {
        f"{layer}{tensor}{name}": value
        for tensor, names in common.items()
        if f"{layer}{tensor}quant" not in own
        for name, value in names.items()
    }


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
