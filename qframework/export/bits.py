"""Codes of a few bits, one behind the other without gaps."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from qframework.export.errors import CheckpointError

#: Codes that are expanded to single bits at a time; a multiple of 8, so that each piece ends with a byte.
_PIECE = 1 << 20


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers from 0 to ``2^bits - 1`` as a row of bytes, the lowest bit of the first code first.

    Args:
        codes: integers of any shape, in the order of their elements.
        bits: of each, 1 to 32.

    Returns:
        uint8, shape ``(ceil(n * bits / 8),)``; the last bits are 0.
    """
    flat = codes.reshape(-1).to(torch.int64)
    if bits == 8:
        return flat.to(torch.uint8)
    if bits < 8 and sys.byteorder == "little":
        return _pack_words(flat, bits)
    places = torch.arange(bits, device=flat.device)
    weights = 1 << torch.arange(8, device=flat.device)
    pieces = []
    for piece in flat.split(_PIECE):
        single = ((piece[:, None] >> places) & 1).reshape(-1)
        single = torch.nn.functional.pad(single, (0, -single.numel() % 8))
        pieces.append((single.reshape(-1, 8) * weights).sum(1).to(torch.uint8))
    return torch.cat(pieces) if pieces else flat.to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes of :func:`pack`.

    Args:
        packed: uint8.
        bits: of each code.
        count: of the codes.

    Returns:
        int64, shape ``(count,)``.

    Raises:
        CheckpointError: another number of bytes, or bits behind the last code that aren't 0.
    """
    if packed.dtype is not torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise CheckpointError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.to(torch.int64)
    if bits < 8 and sys.byteorder == "little":
        return _unpack_words(packed, bits, count)
    places = torch.arange(bits, device=packed.device)
    pieces = []
    for start in range(0, count, _PIECE):
        number = min(_PIECE, count - start)
        piece = packed[start * bits // 8 :][: packed_size(number, bits)].to(torch.int64)
        single = ((piece[:, None] >> torch.arange(8, device=packed.device)) & 1).reshape(-1)
        if bool(single[number * bits :].any()):
            raise CheckpointError("bits behind the last code aren't 0")
        pieces.append((single[: number * bits].reshape(number, bits) << places).sum(1))
    return torch.cat(pieces) if pieces else packed.to(torch.int64)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """:func:`pack` for fewer than 8 bits: 8 codes at once, which fill as many bytes of a 64-bit word as a code has bits."""
    size = packed_size(codes.numel(), bits)
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).reshape(-1, 8)
    words = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    for i in range(8):
        words |= rows[:, i] << (i * bits)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[:size]


def _unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """:func:`unpack` for fewer than 8 bits."""
    rows = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    filled = torch.zeros((rows.shape[0], 8), dtype=torch.uint8, device=rows.device)
    filled[:, :bits] = rows
    words = filled.view(torch.int64)
    codes = torch.cat([(words >> (i * bits)) & ((1 << bits) - 1) for i in range(8)], 1).reshape(-1)
    if bool(codes[count:].any()):
        raise CheckpointError("bits behind the last code aren't 0")
    return codes[:count]
