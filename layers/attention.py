"""Scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.layers.activation import QuantIdentity
from qframework.layers.attention_keywords import OF_FUNCTION
from qframework.layers.attention_masks import Masks, causal_mask, merge_masks
from qframework.layers.base import route_keywords
from qframework.layers.composite import QuantComposite
from qframework.proxy import ActQuantProxyFromInjector, Quantizer, build_proxy
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import TensorLike, dequantize
from qframework.quantizers.none import NoneActQuant
from qframework.quantizers.scaled_int import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

ATTENTION_PREFIXES = (
    "softmax_input_",
    "attn_output_weights_",
    "q_scaled_",
    "k_transposed_",
    "v_",
)
#: The axis along which the product that a tensor goes into sums, which groups of a scale are along.
_SUMMED = {
    **dict.fromkeys((*ATTENTION_PREFIXES, "sdpa_output_"), -1),
    "k_transposed_": -2,
    "v_": -2,
}


class QuantAttention(QuantComposite):
    """Mixin: attention with a quantizer on each operand of its two matrix products.

        scores = quant(scale * q) quant(k^T),   weights = quant(softmax(quant(scores))),   weights quant(v)

    A key that is masked gets exactly no weight, and a query all of whose keys are masked gets 0. The quantizer of the
    scores sees them with the finite part of a float mask, before keys are masked out: -inf is on no grid.
    """

    #: for a prefix that it doesn't take those that may be meant
    prefixes_for: Mapping[str, tuple[str, ...]] = OF_FUNCTION
    softmax_input_quant: QuantIdentity
    attn_output_weights_quant: QuantIdentity
    q_scaled_quant: QuantIdentity
    k_transposed_quant: QuantIdentity
    v_quant: QuantIdentity

    def _add_quantizer(
        self,
        prefix: str,
        quantizer: Quantizer,
        keywords: dict[str, Any],
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Hold the quantizer of one intermediate tensor, in a ``QuantIdentity`` named by its prefix."""
        name = f"{prefix}quant"
        holder = QuantIdentity(act_quant=None)
        holder.act_quant = build_proxy(  # type: ignore[assignment]
            self,
            name,
            quantizer,
            NoneActQuant,
            keywords,
            prefix,
            ActQuantProxyFromInjector,
            {
                "passthrough_act": True,
                "device": device,
                "dtype": dtype,
                "default_group_dim": _SUMMED[prefix],
            },
        )
        self.add_module(name, holder)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: Masks,
        scale: float,
        dropout_p: float,
        groups: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The attended values and the weights.

        Args:
            query: ``(..., L, E)``.
            key: ``(..., S, E)``.
            value: ``(..., S, V)``.
            masks: broadcasting to ``(..., L, S)``.
            scale: of the scores.
            dropout_p: share of the weights to drop, 0 to 1.
            groups: heads of ``query``, along axis -3, that share a head of ``key`` and ``value``.
        """
        query = self.q_scaled_quant(query * scale)
        key = self.k_transposed_quant(key.transpose(-2, -1))
        value = self.v_quant(value)
        if groups != 1:
            key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
        scores = torch.matmul(query, key)
        blocked, bias = masks
        if bias is not None:
            never = bias == -math.inf
            blocked = never if blocked is None else blocked | never
            scores = scores + bias.masked_fill(never, 0.0).to(scores.dtype)
        scores = self.softmax_input_quant(scores)
        if blocked is None:
            weights = scores.softmax(-1)
        else:
            # masked after the softmax: its gradient where all is -inf is nan
            alone = blocked.all(-1, keepdim=True)
            weights = scores.masked_fill(blocked & ~alone, -math.inf).softmax(-1)
            weights = weights.masked_fill(alone, 0.0)
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        weights = self.attn_output_weights_quant(weights)
        return torch.matmul(weights, value), weights


class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` as a module; dropout in training only.

    Args:
        pre_process_q: applied to the query first, such as a rotation; None for nothing.
        pre_process_k: applied to the key.
        pre_process_v: applied to the value.
    """

    def __init__(
        self,
        pre_process_q: Callable[[Any], Any] | None = None,
        pre_process_k: Callable[[Any], Any] | None = None,
        pre_process_v: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.pre_process_q = pre_process_q
        self.pre_process_k = pre_process_k
        self.pre_process_v = pre_process_v

    def _pre_process(
        self, query: TensorLike, key: TensorLike, value: TensorLike
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            dequantize(x if function is None else function(x))
            for function, x in (
                (self.pre_process_q, query),
                (self.pre_process_k, key),
                (self.pre_process_v, value),
            )
        )
        return query, key, value

    def forward(
        self,
        query: TensorLike,
        key: TensorLike,
        value: TensorLike,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend; arguments, shapes and result as for the torch function."""
        query, key, value = self._pre_process(query, key, value)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p if self.training else 0.0,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


class QuantScaledDotProductAttention(QuantAttention, ScaledDotProductAttention):
    """Scaled dot-product attention with a quantizer on each operand of its two matrix products.

    Args:
        pre_process_q: applied to the query first, such as a rotation; None for nothing.
        pre_process_k: applied to the key.
        pre_process_v: applied to the value.
        softmax_input_quant: quantizer of the scores: a class, another layer's proxy to share, or None.
        attn_output_weights_quant: quantizer of the weights: a class, a proxy to share, or None.
        q_scaled_quant: quantizer of the query times the scale: a class, a proxy to share, or None.
        k_transposed_quant: quantizer of the transposed key: a class, a proxy to share, or None.
        v_quant: quantizer of the value: a class, a proxy to share, or None.
        sdpa_output_quant: quantizer of the result: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of the quantizers.
        dtype: of the quantizers.
        **kwargs: names to bind anew in a quantizer, prefixed ``softmax_input_``, ``attn_output_weights_``,
            ``q_scaled_``, ``k_transposed_``, ``v_``, ``sdpa_output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    sdpa_output_quant: QuantIdentity

    def __init__(
        self,
        pre_process_q: Callable[[Any], Any] | None = None,
        pre_process_k: Callable[[Any], Any] | None = None,
        pre_process_v: Callable[[Any], Any] | None = None,
        softmax_input_quant: Quantizer = None,
        attn_output_weights_quant: Quantizer = Uint8ActPerTensorFloat,
        q_scaled_quant: Quantizer = Int8ActPerTensorFloat,
        k_transposed_quant: Quantizer = Int8ActPerTensorFloat,
        v_quant: Quantizer = Int8ActPerTensorFloat,
        sdpa_output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        ScaledDotProductAttention.__init__(self, pre_process_q, pre_process_k, pre_process_v)
        self.return_quant_tensor = return_quant_tensor
        prefixes = (*ATTENTION_PREFIXES, "sdpa_output_")
        routed = route_keywords(self, kwargs, prefixes)
        quantizers = (
            softmax_input_quant,
            attn_output_weights_quant,
            q_scaled_quant,
            k_transposed_quant,
            v_quant,
            sdpa_output_quant,
        )
        for prefix, quantizer in zip(prefixes, quantizers, strict=True):
            self._add_quantizer(prefix, quantizer, routed[prefix], device, dtype)

    def forward(
        self,
        query: TensorLike,
        key: TensorLike,
        value: TensorLike,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Attend.

        Args:
            query: float or quantized tensor ``(..., L, E)``.
            key: ``(..., S, E)``.
            value: ``(..., S, V)``.
            attn_mask: broadcasts to ``(..., L, S)``; bool (true: takes part) or float (added to the scores).
            dropout_p: share of the weights that are dropped, in training only.
            is_causal: query ``i`` looks at keys 0 to ``i``.
            scale: of the scores, ``1 / sqrt(E)`` by default.
            enable_gqa: several heads of ``query``, along axis -3, share one of ``key`` and ``value``.

        Returns:
            ``(..., L, V)``, a tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: both ``attn_mask`` and ``is_causal``; or a quantized result is asked for that can't be had.
            TypeError: a mask that is neither bool nor float.
            ValueError: a number of heads that isn't a multiple of that of ``key``.
        """
        query, key, value = self._pre_process(query, key, value)
        masks = self._masks(query, key, attn_mask, is_causal)
        groups = self._groups(query, key, value) if enable_gqa else 1
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        dropout_p = dropout_p if self.training else 0.0
        out, _ = self._attend(query, key, value, masks, scale, dropout_p, groups)
        return self._pack(self.sdpa_output_quant.act_quant(out))

    def _masks(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Masks:
        if attn_mask is None:
            if not is_causal:
                return Masks()
            return Masks(causal_mask(query.shape[-2], key.shape[-2], query.device))
        if is_causal:
            raise RuntimeError(
                f"{qualified_name(self)}: give either attn_mask or is_causal=True, got both"
            )
        if attn_mask.dtype == torch.bool:
            return Masks(~attn_mask)
        if not attn_mask.is_floating_point():
            raise TypeError(
                f"{qualified_name(self)}: attn_mask must be bool or floating-point, got {attn_mask.dtype}"
            )
        return merge_masks(attn_mask)

    def _groups(self, query: Tensor, key: Tensor, value: Tensor) -> int:
        if min(t.dim() for t in (query, key, value)) < 3:
            raise ValueError(
                f"{qualified_name(self)}: enable_gqa=True needs tensors with a head axis, (..., H, L, E); got "
                f"{', '.join(str(tuple(t.shape)) for t in (query, key, value))}"
            )
        heads, shared = query.shape[-3], key.shape[-3]
        if value.shape[-3] != shared or heads % shared:
            raise ValueError(
                f"{qualified_name(self)}: enable_gqa=True needs as many heads in value as in key, and a multiple "
                f"of them in query; got {heads} in query, {shared} in key, {value.shape[-3]} in value"
            )
        return heads // shared

    def _remedy(self) -> str:
        return "Give sdpa_output_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."
