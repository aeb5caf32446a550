"""Classes that state a rule of their own are asked by the methods that they override."""

from typing import Any

import pytest
import torch

import qframework
from qframework import quantizers as q
from qframework.layers import QuantIdentity

FIELDS = ("value", "scale", "zero_point", "bit_width")


def quantizer_with(part: str, methods: dict[str, Any]) -> QuantIdentity:
    """A learned scale, whose part has a class with a rule, and with methods that are given that of the base."""
    torch.manual_seed(0)
    act = QuantIdentity(q.Int8ActPerTensorFloat, collect_stats_steps=1, return_quant_tensor=True)
    for _ in range(3):
        act(torch.randn(8, 64))
    held = getattr(act.act_quant.tensor_quant, part)
    kind = type(held)
    own = {name: make(getattr(kind, name)) for name, make in methods.items()}
    held.__class__ = type("Own", (kind,), {"rule": lambda self, *how: kind.rule(self, *how), **own})
    return act


def doubled(method: Any) -> Any:
    return lambda self, *args: method(self, *args) * 2


def wide(method: Any) -> Any:
    return lambda self, *args: method(self, *args).double()


@pytest.mark.parametrize(
    ("part", "methods"),
    [
        ("scaling_impl", {"to_evaluate": doubled}),
        ("scaling_impl", {"stored": doubled}),
        ("scaling_impl", {"held": doubled, "stored": doubled}),
        ("msb_clamp_bit_width_impl", {"number": wide}),
        ("msb_clamp_bit_width_impl", {"forward": wide}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_its_methods_give_counts(part, methods, training) -> None:
    act, x = quantizer_with(part, methods).train(training), torch.randn(8, 64)
    with qframework.settings.use(kernels="reference"):
        expected = act(x)
    found = act(x)
    assert act.act_quant.path().endswith("quantize_by_learned_scale")
    for name in FIELDS:
        numbers = getattr(found, name).double(), getattr(expected, name).double()
        torch.testing.assert_close(*numbers, rtol=0, atol=0)
    assert found.bit_width.dtype is expected.bit_width.dtype


def test_whether_it_collects_is_asked_at_each_call() -> None:
    calls = []

    def counted(method: Any) -> Any:
        return lambda self: (calls.append(1), method(self))[1]

    act = quantizer_with("scaling_impl", {"is_collecting": counted})
    for _ in range(3):
        act(torch.randn(8, 64))
    assert len(calls) == 3
