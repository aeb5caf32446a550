"""Learned numbers that start from parameters, and follow them until they are trained or loaded themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import parameter_of
from qframework.functional import defined

#: What a tensor's elements are read as, by their size in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: Integers that are read at a time.
_BLOCK = 2**15


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Numbers that tell the contents of tensors apart: two sums of their bits, weighted by position, of 64 bits each."""
    found: list[int] = []
    for t in tensors:
        bits = _integers(t.detach().contiguous().view(-1))
        place = torch.arange(min(bits.numel(), _BLOCK), device=bits.device)
        weights, others = 2 * place + 1, place * (place + 31) + 17
        sums = [bits.new_zeros(2)]
        for part in bits.split(_BLOCK):
            n = part.numel()
            mixed = (part >> 7).bitwise_xor_(part)
            both = ((part * weights[:n]).sum(), mixed.mul_(others[:n]).sum())
            # places count: what is in another block is another number
            sums.append(sums[-1] * 0x9E3779B1 + torch.stack(both))
        found += [t.numel(), *sums[-1].tolist()]
    return tuple(found)


def _integers(flat: Tensor) -> Tensor:
    """Contents as integers of 64 bits."""
    size = flat.element_size()
    together = 8 // size
    if flat.numel() % together == 0 and flat.storage_offset() % together == 0:
        return flat.view(torch.int64)
    return flat.view(_INTEGERS[size]).to(torch.int64)


@defined
def follow(number: FollowsParameters) -> None:
    """Start a number anew, where it is still what it was initialised to and its parameters are others.

    Args:
        number: the module that holds it.
    """
    value = number.value
    if not number.follows or type(value) is not nn.Parameter or value.is_meta:
        return
    if not value.requires_grad:
        return
    if not torch.equal(value, number.initial):
        number.follows = False  # trained, loaded, or written to by a user: it stands for itself
    elif not number.is_costly or fingerprint(number.origins()) != number.seen:
        number.init_from_parameters()


class FollowsParameters(nn.Module):
    """Mixin: a learned number, ``value``, that is initialised from parameters.

    Until anything else writes to it (an optimizer, a state dict, a user, through ``.data`` or not), it is initialised anew
    at every call, so that it can't be stale, however the parameters were edited. That is read off its contents: a buffer
    ``initial`` holds what it was initialised to. One that is not to be trained (``requires_grad_(False)``) stays as it is.

    Attributes:
        follows: False once it was seen to be written to, for good.
        is_costly: whether it is searched for, so that contents of parameters are compared before.
        seen: the :func:`fingerprint` of the parameters that it was initialised from, where it is costly.
    """

    value: nn.Parameter
    initial: Tensor
    follows: bool
    is_costly: bool
    seen: tuple[int, ...]

    def _start_following(self, shape: tuple[int, ...], dtype: Any, device: Any) -> None:
        """The last step of a constructor."""
        self.value = parameter_of(torch.ones(shape, dtype=dtype, device=device))
        self.register_buffer("initial", torch.ones_like(self.value), persistent=False)
        self.init_from_parameters()

    def origins(self) -> Sequence[Tensor]:
        """For subclasses: the parameters."""
        raise NotImplementedError

    def computed(self) -> Tensor:
        """For subclasses: the number by the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def init_from_parameters(self) -> None:
        """Start anew from the parameters. Version counters stay, so that graphs and frozen results that hold them stay valid."""
        self.follows = True
        if self.value.is_meta:  # there is nothing to compute
            self.seen = ()
            return
        self.value.data.copy_(self.computed())
        self.initial.data.copy_(self.value)
        self.seen = fingerprint(self.origins()) if self.is_costly else ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is saved belongs to the parameters as they are now."""
        follow(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = len(args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "value" in state_dict and len(args[-1]) == errors:
            self.follows = False
