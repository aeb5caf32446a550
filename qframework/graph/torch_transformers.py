"""Torch's transformer layers as graphs: what they compute without their fused inference, which reads the parameters of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qframework.layers import QuantTransformerEncoderLayer


def _encoder_layer(
    self: Any,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = False,
) -> Any:
    masks = (src_mask, src_key_padding_mask)
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


def _encoder(
    self: Any,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = None,
) -> Any:
    x = src
    for layer in self.layers:
        x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
    return x if self.norm is None else self.norm(x)


def _decoder(
    self: Any,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    x = tgt
    for layer in self.layers:
        x = layer(
            x,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
    return x if self.norm is None else self.norm(x)


def _transformer(
    self: Any,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    memory = self.encoder(
        src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
    )
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


#: From types to what they compute, in calls of their parts.
PLAIN: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: nn.TransformerDecoderLayer.forward,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
    QuantTransformerEncoderLayer: QuantTransformerEncoderLayer.forward,
}


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let torch's attention and encoder layers call their parts, for a while."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_PARTS: dict[str, Any] = {
    "self_attn": nn.MultiheadAttention,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
}


def changed_parts(layer: nn.Module) -> list[str]:
    """Parts of an encoder layer of torch that aren't of the class any more that it was made with."""
    found = []
    for name, kind in _PARTS.items():
        part: Any = layer._modules.get(name)
        own = isinstance(part, kind) and type(part).forward is kind.forward
        if not own or "forward" in vars(part):
            found.append(name)
    return found


def is_encoder_layer(module: nn.Module) -> bool:
    """Whether a module computes as an encoder layer of torch."""
    own: Any = type(module)
    return (
        isinstance(module, nn.TransformerEncoderLayer)
        and own.forward is nn.TransformerEncoderLayer.forward
        and "forward" not in vars(module)
    )


def call_changed_parts(model: nn.Module) -> None:
    """Let encoder layers call their parts, where their fused inference would read past what these have become.

    Args:
        model: some of whose layers have been replaced; changed in place.
    """
    for module in model.modules():
        if is_encoder_layer(module) and changed_parts(module):
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        elif type(module) is nn.TransformerEncoder:
            layers = list(module.layers)
            if not all(is_encoder_layer(m) and not changed_parts(m) for m in layers):
                module.use_nested_tensor = False
