"""Codes of a few bits without gaps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframework.export import CheckpointError
from qframework.export.bits import pack, packed_size, unpack


def by_hand(codes: list[int], bits: int) -> bytes:
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    return whole.to_bytes(-(-len(codes) * bits // 8), "little")


@given(st.integers(1, 32), st.data())
def test_codes_are_packed_from_the_lowest_bit_on(bits, data) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    packed = pack(torch.tensor(codes), bits)
    assert bytes(packed.tolist()) == by_hand(codes, bits)
    assert packed.numel() == packed_size(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", [3, 11])
def test_many_codes_are_the_same_as_few(bits) -> None:
    codes = torch.randint(2**bits, ((1 << 20) + 5,))
    assert torch.equal(unpack(pack(codes, bits), bits, codes.numel()), codes)


@pytest.mark.parametrize("bits", [1, 4, 8, 9])
def test_no_codes_take_no_bytes(bits) -> None:
    packed = pack(torch.zeros(0, dtype=torch.int64), bits)
    assert packed.shape == (0,) and packed.dtype is torch.uint8
    assert unpack(packed, bits, 0).shape == (0,)


@pytest.mark.parametrize("bits", [3, 9])
def test_other_numbers_of_bytes_and_bits_too_many_are_refused(bits) -> None:
    packed = pack(torch.ones(5, dtype=torch.int64), bits)
    for wrong in (packed[:-1], packed.to(torch.int32), packed.reshape(1, -1)):
        with pytest.raises(CheckpointError, match=f"5 codes of {bits} bits take"):
            unpack(wrong, bits, 5)
    packed[-1] |= 128
    with pytest.raises(CheckpointError, match="behind the last code"):
        unpack(packed, bits, 5)
