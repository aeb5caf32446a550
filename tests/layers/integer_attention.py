"""Attention and the transformer encoder on the machine of :mod:`integer_machine`."""

from __future__ import annotations

import math
from typing import Any

import torch
from integer_machine import Integers, add, linear, lookup, matmul, quantize, requantize
from torch import Tensor
from torch.nn import functional as F


def enter(proxy: Any, x: Integers | Tensor) -> Integers:
    """The input of a quantizer: floats by its converter, integers scaled to its grid."""
    return requantize(proxy, x)


def attend(layer: Any, q: Integers, k: Integers, v: Integers, mask: Any) -> tuple[Integers, ...]:
    """The accumulator of the second product, and the attention weights.

    Args:
        q, k, v: ``(..., L, E)``, ``(..., S, E)``, ``(..., S, V)``, on the grids of the layer.
        mask: None, bool (true: out of bounds) or float, broadcasting to ``(..., L, S)``.
    """
    scores = matmul(q, k.view(lambda codes: codes.transpose(-2, -1)))
    holder = layer.softmax_input_quant.act_quant
    bias, blocked = 0.0, None
    if mask is not None and mask.dtype == torch.bool:
        blocked = mask
    elif mask is not None:
        blocked = mask == -math.inf
        bias = torch.where(blocked, 0.0, mask.double())
    if holder.is_quant_enabled:
        logits = requantize(holder, scores, torch.as_tensor(bias)).value
    else:
        logits = scores.value + bias
    # A key out of bounds is left out of the sum; where none is left, there are no weights.
    taken = torch.ones_like(logits) if blocked is None else (~blocked).expand_as(logits).double()
    powers = torch.exp(logits - logits.amax(-1, keepdim=True)) * taken
    shares = powers / powers.sum(-1, keepdim=True).clamp_min(1e-300)
    weights = quantize(layer.attn_output_weights_quant.act_quant, shares)
    return matmul(weights, v), weights


def multihead(layer: Any, query: Any, key: Any, value: Any, mask: Any) -> tuple[Integers, Integers]:
    """The accumulator of the last projection and the weights by head; all tensors have the batch first.

    Args:
        query, key, value: integers or floats, ``(B, L, E)`` and ``(B, S, E)``.
        mask: broadcasting to ``(B, heads, L, S)``.
    """
    size = layer.embed_dim
    if layer.packed_in_proj:
        parts = [
            linear(layer.in_proj, enter(layer.in_proj.input_quant, t)) for t in (query, key, value)
        ]
        parts = [
            p._replace(codes=p.codes[..., i * size : (i + 1) * size]) for i, p in enumerate(parts)
        ]
    else:
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        parts = [
            linear(p, enter(p.input_quant, t))
            for p, t in zip(projections, (query, key, value), strict=True)
        ]
    # The division by sqrt(head_dim) is part of the scale.
    parts[0] = parts[0]._replace(scale=parts[0].scale / math.sqrt(layer.head_dim))
    holders = layer.q_scaled_quant, layer.k_transposed_quant, layer.v_quant
    q, k, v = (requantize(h.act_quant, p) for h, p in zip(holders, parts, strict=True))
    k, v = (
        _with_more_keys(layer, h.act_quant, t, extra)
        for h, t, extra in zip(holders[1:], (k, v), (layer.bias_k, layer.bias_v), strict=True)
    )
    split = lambda codes: codes.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)  # noqa: E731
    out, weights = attend(layer, q.view(split), k.view(split), v.view(split), mask)
    out = out.view(lambda codes: codes.transpose(1, 2).flatten(-2))
    return linear(layer.out_proj, requantize(layer.out_proj.input_quant, out)), weights


def _with_more_keys(layer: Any, proxy: Any, t: Integers, extra: Any) -> Integers:
    batch = t.codes.shape[0]
    more = [] if extra is None else [quantize(proxy, extra)]
    more += [quantize(proxy, torch.zeros(1, 1, layer.embed_dim))] if layer.add_zero_attn else []
    codes = [t.codes, *(m.codes.expand(batch, -1, -1) for m in more)]
    return t._replace(codes=torch.cat(codes, 1))


def residual(layer: Any, a: Any, b: Any) -> Integers:
    """A sum on the one grid of the operands, scaled to that of the result where it has one."""
    total = add(enter(layer.input_quant, a), enter(layer.input_quant, b))
    return requantize(layer.output_quant, total) if layer.output_quant.is_quant_enabled else total


def norm(layer: Any, x: Any) -> Any:
    """A special function of floats, and a converter where the result has a grid."""
    x = x.value if isinstance(x, Integers) else x.double()
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    y = F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return quantize(layer.output_quant, y) if layer.output_quant.is_quant_enabled else y


def encoder_layer(layer: Any, x: Any, mask: Any) -> Any:
    """``QuantTransformerEncoderLayer`` with the batch first, residual sums on a grid."""

    def attended(x):
        return multihead(layer.self_attn, x, x, x, mask)[0]

    def fed(x):
        acc = linear(layer.linear1, enter(layer.linear1.input_quant, x))
        # The function and the next quantizer are one table.
        return linear(layer.linear2, lookup(layer.linear2.input_quant, layer.activation, acc))

    if layer.norm_first:
        x = residual(layer.residual1, x, attended(norm(layer.norm1, x)))
        return residual(layer.residual2, x, fed(norm(layer.norm2, x)))
    x = norm(layer.norm1, residual(layer.residual1, x, attended(x)))
    return norm(layer.norm2, residual(layer.residual2, x, fed(x)))
