"""Helpers around layers: batch norms folded in, keys of state dicts renamed."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.layers.batch_norm import mul_add_from_bn

__all__ = [
    "check_tensors_same_ptr",
    "merge_bn",
    "mul_add_from_bn",
    "rename_state_dict_by_postfix",
    "rename_state_dict_by_prefix",
]


@torch.no_grad()
def merge_bn(layer: nn.Module, bn: nn.Module, output_channel_dim: int = 0) -> None:
    """Fold a batch norm that follows a layer into its weight and bias, in place; in evaluation mode nothing changes.

        weight * gamma / sqrt(var + eps),   (bias - mean) * gamma / sqrt(var + eps) + beta

    A missing bias is created. Whoever calls it takes the batch norm out of the model.

    Args:
        layer: quantized or not, with a weight.
        bn: ``BatchNorm1d``, ``2d`` or ``3d`` over the layer's output channels, with running statistics.
        output_channel_dim: axis of the weight that counts the output channels; 1 for float transposed convolutions.
            A quantized layer knows its own.

    Raises:
        ValueError: no running statistics, or another number of channels.
    """
    fold: Any = getattr(layer, "merge_bn_in", None)
    if fold is not None:
        fold(bn)
        return
    held: Any = layer
    norm: Any = bn
    weight, mean, var = held.weight, norm.running_mean, norm.running_var
    channels = weight.shape[output_channel_dim]
    if mean is None or var is None or mean.shape != (channels,):
        got = "no running statistics" if mean is None else f"{mean.numel()} channels"
        raise ValueError(
            f"merge_bn: the weight of {type(layer).__name__} has {channels} output channels along axis "
            f"{output_channel_dim}; got a {type(bn).__name__} with {got}"
        )
    factor, shift = mul_add_from_bn(mean, var, norm.eps, norm.weight, norm.bias)
    shape = [1] * weight.dim()
    shape[output_channel_dim] = channels
    weight.mul_(factor.reshape(shape))
    if held.bias is None:
        held.bias = nn.Parameter(shift.to(weight.dtype))
    else:
        held.bias.mul_(factor).add_(shift)


def rename_state_dict_by_prefix(
    old_prefix: str, new_prefix: str, state_dict: MutableMapping[str, Any]
) -> None:
    """Rename the keys that start with a prefix, in place; their order stays.

    Args:
        old_prefix: of the keys.
        new_prefix: in its place.
        state_dict: to change.

    Raises:
        ValueError: a new key is already there.
    """
    _rename(
        state_dict,
        {
            key: new_prefix + key.removeprefix(old_prefix)
            for key in state_dict
            if key.startswith(old_prefix)
        },
    )


def rename_state_dict_by_postfix(
    old_postfix: str, new_postfix: str, state_dict: MutableMapping[str, Any]
) -> None:
    """Rename the keys that end with a postfix, in place; their order stays.

    Args:
        old_postfix: of the keys.
        new_postfix: in its place.
        state_dict: to change.

    Raises:
        ValueError: a new key is already there.
    """
    _rename(
        state_dict,
        {
            key: key.removesuffix(old_postfix) + new_postfix
            for key in state_dict
            if key.endswith(old_postfix)
        },
    )


def _rename(state_dict: MutableMapping[str, Any], names: dict[str, str]) -> None:
    renamed = [(names.get(key, key), value) for key, value in state_dict.items()]
    seen: set[str] = set()
    for key, _ in renamed:
        if key in seen:
            raise ValueError(f"renaming keys of a state dict: {key!r} would be there twice")
        seen.add(key)
    # In place: a state dict of torch carries metadata as an attribute.
    state_dict.clear()
    state_dict.update(renamed)


def check_tensors_same_ptr(tensor_list: Iterable[Tensor]) -> bool:
    """Whether tensors start at the same place in memory.

    Args:
        tensor_list: tensors, or quantized tensors, whose values are looked at.
    """
    pointers = {getattr(t, "value", t).data_ptr() for t in tensor_list}
    return len(pointers) <= 1
