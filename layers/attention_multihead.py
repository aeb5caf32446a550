"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qframework.layers.attention import ATTENTION_PREFIXES, QuantAttention
from qframework.layers.attention_keywords import OF_LAYER
from qframework.layers.attention_masks import (
    Masks,
    causal_mask,
    check_mask,
    merge_masks,
    with_unmasked_keys,
)
from qframework.layers.base import route_keywords
from qframework.layers.composite import build_part
from qframework.layers.linear import QuantLinear
from qframework.proxy import Quantizer
from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import TensorLike, dequantize
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)

_IN_PROJ = ("in_proj_input_", "in_proj_weight_", "in_proj_bias_")
_OUT_PROJ = ("out_proj_input_", "out_proj_weight_", "out_proj_bias_", "out_proj_output_")


class QuantMultiheadAttention(QuantAttention, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with quantized projections and matrix products.

    The projections are ``QuantLinear`` layers: ``in_proj``, or with ``packed_in_proj=False`` ``q_proj``, ``k_proj``
    and ``v_proj``, and ``out_proj``. A state dict of the torch layer loads into either form.

    One difference: a query all of whose keys are masked attends to nothing and gives the bias of ``out_proj``, also
    where torch gives nan.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as in torch.
        packed_in_proj: one projection, and one quantizer, for query, key and value; without it three. It is meant
            for self-attention: different tensors are projected by it together, each by the whole weight.
        in_proj_input_quant: quantizer of query, key and value: a class, another layer's proxy to share, or None.
        in_proj_weight_quant: quantizer of the weights that project them: a class, a proxy to share, or None.
        in_proj_bias_quant: quantizer of the biases that project them: a class, a proxy to share, or None.
        softmax_input_quant: quantizer of the scores: a class, a proxy to share, or None.
        attn_output_weights_quant: quantizer of the attention weights: a class, a proxy to share, or None.
        q_scaled_quant: quantizer of the projected query divided by ``sqrt(head_dim)``: a class, a proxy to share, or None.
        k_transposed_quant: quantizer of the projected, transposed key: a class, a proxy to share, or None.
        v_quant: quantizer of the projected value: a class, a proxy to share, or None.
        out_proj_input_quant: quantizer of the attended values: a class, a proxy to share, or None.
        out_proj_weight_quant: quantizer of the weight that projects them: a class, a proxy to share, or None.
        out_proj_bias_quant: quantizer of the bias that projects them: a class, a proxy to share, or None.
        out_proj_output_quant: quantizer of the result: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; the weights are a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``in_proj_`` or ``out_proj_`` and then ``input_``,
            ``weight_``, ``bias_`` (``out_proj_output_`` too); or ``softmax_input_``, ``attn_output_weights_``,
            ``q_scaled_``, ``k_transposed_``, ``v_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        ValueError: sizes that don't fit each other.
    """

    prefixes_for = OF_LAYER
    in_proj: QuantLinear
    q_proj: QuantLinear
    k_proj: QuantLinear
    v_proj: QuantLinear
    out_proj: QuantLinear  # type: ignore[assignment]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        packed_in_proj: bool = True,
        in_proj_input_quant: Quantizer = Int8ActPerTensorFloat,
        in_proj_weight_quant: Quantizer = Int8WeightPerTensorFloat,
        in_proj_bias_quant: Quantizer = Int32Bias,
        softmax_input_quant: Quantizer = None,
        attn_output_weights_quant: Quantizer = Uint8ActPerTensorFloat,
        q_scaled_quant: Quantizer = Int8ActPerTensorFloat,
        k_transposed_quant: Quantizer = Int8ActPerTensorFloat,
        v_quant: Quantizer = Int8ActPerTensorFloat,
        out_proj_input_quant: Quantizer = Int8ActPerTensorFloat,
        out_proj_weight_quant: Quantizer = Int8WeightPerTensorFloat,
        out_proj_bias_quant: Quantizer = Int32Bias,
        out_proj_output_quant: Quantizer = None,
        batch_first: bool = False,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if embed_dim > 0 and num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"{type(self).__name__}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        nn.MultiheadAttention.__init__(
            self,
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        if packed_in_proj and not self._qkv_same_embed_dim:
            raise ValueError(
                f"{type(self).__name__}: packed_in_proj=True needs kdim and vdim equal to embed_dim={embed_dim}, got "
                f"kdim={self.kdim} and vdim={self.vdim}; use packed_in_proj=False"
            )
        self.packed_in_proj = packed_in_proj
        routed = route_keywords(self, kwargs, (*_IN_PROJ, *_OUT_PROJ, *ATTENTION_PREFIXES))
        options = {"bias": bias, "device": device, "dtype": dtype}
        in_options = {
            **options,
            **_unprefixed(routed, _IN_PROJ, "in_proj_"),
            "input_quant": in_proj_input_quant,
            "weight_quant": in_proj_weight_quant,
            "bias_quant": in_proj_bias_quant,
        }
        out_options = {
            **options,
            **_unprefixed(routed, _OUT_PROJ, "out_proj_"),
            "input_quant": out_proj_input_quant,
            "weight_quant": out_proj_weight_quant,
            "bias_quant": out_proj_bias_quant,
            "output_quant": out_proj_output_quant,
            "return_quant_tensor": return_quant_tensor,
        }
        self._take_over_projections(in_options, out_options)
        quantizers = (
            softmax_input_quant,
            attn_output_weights_quant,
            q_scaled_quant,
            k_transposed_quant,
            v_quant,
        )
        for prefix, quantizer in zip(ATTENTION_PREFIXES, quantizers, strict=True):
            self._add_quantizer(prefix, quantizer, routed[prefix], device, dtype)

    def _take_over_projections(
        self, in_options: dict[str, Any], out_options: dict[str, Any]
    ) -> None:
        """Put quantized layers in place of the parameters that the torch layer has just made."""
        size = self.embed_dim
        if self.packed_in_proj:
            sizes = {"in_proj": (size, 3 * size)}
            weights: tuple[Any, ...] = (self.in_proj_weight,)
            biases: tuple[Any, ...] = (self.in_proj_bias,)
        else:
            widths = {"q_proj": size, "k_proj": self.kdim, "v_proj": self.vdim}
            sizes = {name: (width, size) for name, width in widths.items()}
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        sizes["out_proj"] = (size, size)
        weights, biases = (*weights, self.out_proj.weight), (*biases, self.out_proj.bias)
        del self.out_proj  # back at the end, where the parameters come in the order of use
        for (name, shape), weight, bias in zip(sizes.items(), weights, biases, strict=True):
            options = out_options if name == "out_proj" else in_options
            with torch.random.fork_rng(devices=[]):  # the torch layer drew its numbers already
                layer = build_part(self, name, QuantLinear, *shape, **options)
            layer.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone())
            self.add_module(name, layer)
        for name in (*_FLOAT_WEIGHTS, "in_proj_weight", "in_proj_bias"):
            self.register_parameter(name, None)

    @property
    def return_quant_tensor(self) -> bool:  # type: ignore[override]
        """Whether the result is a quantized tensor."""
        return self.out_proj.return_quant_tensor

    @return_quant_tensor.setter
    def return_quant_tensor(self, value: bool) -> None:
        self.out_proj.return_quant_tensor = value

    def forward(  # type: ignore[override]
        self,
        query: TensorLike,
        key: TensorLike,
        value: TensorLike,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Tensor | None]:
        """Attend.

        Args:
            query: float or quantized tensor ``(L, B, embed_dim)``, with ``batch_first`` ``(B, L, embed_dim)``,
                unbatched ``(L, embed_dim)``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(B, S)``, unbatched ``(S,)``; bool (true: ignored) or float (added to the scores).
            need_weights: return the weights too.
            attn_mask: ``(L, S)`` or ``(B * num_heads, L, S)``; bool (true: ignored) or float.
            average_attn_weights: over heads.
            is_causal: says that ``attn_mask`` is causal, which is then used as it is; without one, query ``i``
                looks at keys 0 to ``i``.

        Returns:
            The result, in the shape of ``query``, a tensor or with ``return_quant_tensor`` a quantized tensor; and
            the quantized attention weights, ``(B, L, S)``, by head ``(B, num_heads, L, S)``, unbatched without
            ``B``, or None.

        Raises:
            RuntimeError: a quantized result is asked for that can't be had.
            TypeError: a mask that is neither bool nor float.
            ValueError: shapes that don't fit each other.
        """
        batched = query.dim() == 3
        self._check_shapes(query, key, value)
        q, k, v = (
            t.unsqueeze(0) if not batched else t if self.batch_first else t.transpose(0, 1)
            for t in self._project(query, key, value, batched)
        )
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(batch, 1, self.embed_dim)], 1) for t in (k, v))
        if is_causal and attn_mask is None:
            attn_mask = causal_mask(queries, keys, q.device)
        masks = self._masks(key_padding_mask, attn_mask, batch if batched else 0, queries, keys)
        out, weights = self._attend(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            masks,
            1 / math.sqrt(self.head_dim),
            self.dropout if self.training else 0.0,
        )
        out = out.unflatten(0, (batch, self.num_heads))
        if not batched:
            out = out.squeeze(0).transpose(0, 1)
        else:
            out = out.permute(0, 2, 1, 3) if self.batch_first else out.permute(2, 0, 1, 3)
        result = self.out_proj(out.flatten(-2))
        if not need_weights:
            return result, None
        weights = weights.unflatten(0, (batch, self.num_heads))
        if average_attn_weights:
            weights = weights.mean(1)
        return result, weights if batched else weights.squeeze(0)

    def _heads(self, t: Tensor) -> Tensor:
        """``(B, L, embed_dim)`` to ``(B * num_heads, L, head_dim)``."""
        return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]

    def _project(
        self, query: TensorLike, key: TensorLike, value: TensorLike, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.packed_in_proj:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        # One call, so that statistics count these tensors as one batch.
        axis = 1 if batched and self.batch_first else 0
        parts: list[Any] = [query, key] if key is value else [query, key, value]
        own = self.in_proj._modules.get("input_quant")  # a factor may stand in front
        if own is None or not own.is_idle:  # type: ignore[truthy-function]
            parts = [dequantize(t) for t in parts]
        projected = self.in_proj(torch.cat(parts, axis)).split([t.shape[axis] for t in parts], axis)
        q, k, v = projected[0], projected[1], projected[-1]
        size = self.embed_dim
        return q[..., :size], k[..., size : 2 * size], v[..., 2 * size :]

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch: int,
        queries: int,
        keys: int,
    ) -> Masks:
        """Masks for scores of shape ``(B * num_heads, L, S)``; ``batch`` is 0 where the input has none."""
        heads = self.num_heads * (batch or 1)
        if key_padding_mask is not None:
            shape = (batch, keys) if batch else (keys,)
            check_mask(self, "key_padding_mask", key_padding_mask, (shape,))
            by_head = key_padding_mask.reshape(-1, 1, 1, keys).expand(-1, self.num_heads, 1, -1)
            key_padding_mask = by_head.reshape(heads, 1, keys)
        if attn_mask is not None:
            allowed = ((queries, keys), (heads, queries, keys))
            check_mask(self, "attn_mask", attn_mask, allowed)
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        return merge_masks(
            with_unmasked_keys(attn_mask, more), with_unmasked_keys(key_padding_mask, more)
        )

    def _check_shapes(self, query: TensorLike, key: TensorLike, value: TensorLike) -> None:
        ranks = {query.dim(), key.dim(), value.dim()}
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if ranks not in ({2}, {3}) or widths != (self.embed_dim, self.kdim, self.vdim):
            problem = (
                f"query, key and value must all have 2 or all 3 axes, the last of sizes {self.embed_dim}, "
                f"{self.kdim} and {self.vdim}"
            )
        elif key.shape[:-1] != value.shape[:-1]:
            problem = "key and value must have the same length and batch size"
        elif query.dim() == 3 and query.shape[self._batch_axis] != key.shape[self._batch_axis]:
            problem = f"query and key must have the same batch size, axis {self._batch_axis}"
        else:
            return
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"{qualified_name(self)}: {problem}; got {shapes}")

    def extra_repr(self) -> str:
        """The sizes, and what differs from the defaults."""
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        parts += [f"{n}=True" for n in ("batch_first", "add_zero_attn") if getattr(self, n)]
        return ", ".join([*parts, *filter(None, [super().extra_repr()])])

    @property
    def _batch_axis(self) -> int:
        return 0 if self.batch_first else 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = ("in_proj",) if self.packed_in_proj else ("q_proj", "k_proj", "v_proj")
        for kind in ("weight", "bias"):
            together = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if together is not None:
                for name, part in zip(names, together.tensor_split(len(names)), strict=True):
                    state_dict[f"{prefix}{name}.{kind}"] = part
        for name in _FLOAT_WEIGHTS:
            if f"{prefix}{name}" in state_dict:
                layer = name.removesuffix("_weight")
                state_dict[f"{prefix}{layer}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


_FLOAT_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _unprefixed(
    routed: dict[str, dict[str, Any]], prefixes: tuple[str, ...], layer: str
) -> dict[str, Any]:
    """Keywords of the projections as ``QuantLinear`` takes them."""
    return {
        prefix.removeprefix(layer) + name: value
        for prefix in prefixes
        for name, value in routed[prefix].items()
    }
