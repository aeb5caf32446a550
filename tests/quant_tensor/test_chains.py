"""Chains of random functions: what claims to be quantized is what integer arithmetic gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_tensors import make, per_channel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qframework.quant_tensor import IntQuantTensor


def weight(x: Any, *kernel: int) -> IntQuantTensor:
    """A weight of 4 bits, scaled per output channel, for the axis behind the batch."""
    out, shape = 3, (3, x.shape[1], *kernel)
    scale = per_channel(shape, 0) if x.shape[0] % 2 else torch.tensor(0.25)
    return make(shape, bits=4, scale=scale, seed=out)


# on a tensor with values, and on the integers alone; the second gets (integers, record)
STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (F.relu, lambda q, r: q.clamp(min=r.zero_point)),
    "negate": (lambda x: -x, lambda q, r: -q),
    "double": (lambda x: x + x, lambda q, r: q + q),
    "difference": (lambda x: x - x.flip(0), lambda q, r: q - q.flip(0)),
    "square": (lambda x: x * x, lambda q, r: q * q),
    "transpose": (lambda x: x.transpose(0, 1), lambda q, r: q.transpose(0, 1)),
    "permute": (lambda x: x.permute(0, 1, 3, 2), lambda q, r: q.permute(0, 1, 3, 2)),
    "flip": (lambda x: torch.flip(x, (1, 2)), lambda q, r: torch.flip(q, (1, 2))),
    "roll": (lambda x: torch.roll(x, 1, 2), lambda q, r: torch.roll(q, 1, 2)),
    "slice": (lambda x: x[:, :, :2], lambda q, r: q[:, :, :2]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), lambda q, r: q.repeat(1, 2, 1, 1)),
    "stack": (lambda x: torch.stack([x, x]).flatten(0, 1), lambda q, r: torch.stack([q, q]).flatten(0, 1)),
    "cat": (lambda x: torch.cat([x, x], 2), lambda q, r: torch.cat([q, q], 2)),
    "chunk": (lambda x: x.chunk(2, 0)[0], lambda q, r: q.chunk(2, 0)[0]),
    "pad": (lambda x: F.pad(x, (1, 0)), lambda q, r: F.pad(q - r.zero_point, (1, 0)) + r.zero_point),
    "max pool": (lambda x: F.max_pool2d(x, 2, 1), lambda q, r: F.max_pool2d(q, 2, 1)),
    "average pool": (lambda x: F.avg_pool2d(x, 2, 1), lambda q, r: (F.avg_pool2d(q, 2, 1) * 4).round()),
    "sum": (lambda x: x.sum(1, keepdim=True), lambda q, r: q.sum(1, keepdim=True)),
    "mean": (lambda x: x.mean(3, keepdim=True), lambda q, r: q.sum(3, keepdim=True)),
    "amax": (lambda x: x.amax(2, keepdim=True), lambda q, r: q.amax(2, keepdim=True)),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), lambda q, r: F.interpolate(q, scale_factor=2)),
    "clamp": (lambda x: x.clamp(min=0), lambda q, r: q.clamp(min=r.zero_point)),
    "fill": (lambda x: x.masked_fill(torch.ones(x.shape[-1]) > 2, 0), lambda q, r: q),
    "conv": (lambda x: F.conv2d(x, weight(x, 1, 1)), lambda q, r: F.conv2d(q, weight(r, 1, 1).int().double())),
    "matmul": (
        lambda x: torch.matmul(x, x.transpose(2, 3)),
        lambda q, r: torch.matmul(q, q.transpose(2, 3)),
    ),
}  # fmt: skip

starts = st.builds(
    make,
    shape=st.just((2, 3, 4, 4)),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    scale=st.sampled_from([0.125, 0.3, per_channel((2, 3, 4, 4), 1)]),
    zero=st.sampled_from([0.0, 0.0, 3.0]),
    seed=st.integers(0, 5),
)


def low_and_high(q: IntQuantTensor) -> tuple[float, float]:
    bits = float(q.bit_width)
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if q.signed else (0.0, 2.0**bits - 1)


@given(starts, st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_chain_is_integer_arithmetic_as_long_as_it_claims_to_be_quantized(start, names) -> None:
    x, q = start, start.int().double()
    for name in names:
        on_values, on_integers = STEPS[name]
        try:
            result = on_values(x)
        except RuntimeError as error:
            # products of zero points, and sizes that a function can't take, are refused by name
            assert any(
                t in str(error) for t in ("zero point", "size", "dimension", "Output", "mat")
            )
            return
        plain = on_values(x.value)
        torch.testing.assert_close(getattr(result, "value", result), plain)
        if not isinstance(result, IntQuantTensor):
            return  # decayed: a float tensor, with the values of the function on values
        q = on_integers(q, x)
        x = result
        if float(x.bit_width) > 48:
            return  # float64 no longer holds every integer
        exact = x.value / x.scale + x.zero_point
        room = 1e-9 * float(q.abs().max() + 1)
        assert float((exact - q).abs().max()) <= room, names
        low, high = low_and_high(x)
        assert low <= float(q.min()) and float(q.max()) <= high, names
        assert x.is_valid


@pytest.mark.parametrize("name", STEPS)
def test_each_step_keeps_one_scale_or_says_that_it_does_not(name) -> None:
    x = make((2, 3, 4, 4), bits=4)
    result = STEPS[name][0](x)
    assert isinstance(result, IntQuantTensor) and result.is_valid
