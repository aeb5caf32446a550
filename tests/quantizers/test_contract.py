"""Every predefined quantizer keeps the contract that a researcher's own is put through."""

from __future__ import annotations

import pytest

from qframework import quantizers
from qframework.core.function_wrapper import CeilSte
from qframework.core.quant import IntQuant
from qframework.inject.resolver import Resolver
from qframework.quantizers import Int8WeightPerTensorFloat, QuantSolver
from qframework.testing import QuantizerContract

RANGE = {"min_val": -2.0, "max_val": 2.0}
KEYWORDS = {
    "IntBias": {"bit_width": 8},
    "Int8ActPerTensorFloatMinMaxInit": RANGE,
    "Int8ActPerTensorFixedPointMinMaxInit": RANGE,
    "Uint8ActPerTensorFloatMaxInit": {"max_val": 2.0},
    "Uint8ActPerTensorFixedPointMaxInit": {"max_val": 2.0},
}
SHAPES = {"BatchQuant1d": (4, 16, 16), "BatchQuant2d": (4, 3, 4, 16)}
#: Compiled and exported here; the others are where they are tested.
SLOW = {"Int8WeightPerTensorFloat", "Uint8ActPerTensorLSQ", "TruncTo8bit", "Int8Bias"}


def predefined() -> list[str]:
    """The quantizers that a layer can be given, but those that switch quantization off."""
    names = []
    for name in quantizers.__all__:
        cls = getattr(quantizers, name)
        if issubclass(cls, QuantSolver) and not name.endswith("Solver"):
            if Resolver(cls).read("quant_type") != "fp":
                names.append(name)
    return names


def contract(name: str) -> type[QuantizerContract]:
    shape = next((s for end, s in SHAPES.items() if name.endswith(end)), (4, 16))
    body = {
        "quantizer": getattr(quantizers, name),
        "keywords": KEYWORDS.get(name, {}),
        "shape": shape,
        "__module__": __name__,
    }
    made = type(f"Test{name}", (QuantizerContract,), body)
    if name not in SLOW:
        made.test_exports = made.test_compiled_is_eager = None
    return made


globals().update({f"Test{name}": contract(name) for name in predefined()})


def test_all_families_are_there() -> None:
    found = predefined()
    assert len(found) > 60
    for part in ("MSE", "HQO", "LSQ", "PACT", "DoReFa", "Accumulator", "Dynamic", "Bias", "Trunc"):
        assert any(part in n for n in found), part


class OwnCeil(Int8WeightPerTensorFloat):
    bit_width = 3
    float_to_int_impl = CeilSte


class TestOwn(QuantizerContract):
    quantizer = OwnCeil


class OffGrid(IntQuant):
    def forward(self, scale, zero_point, bit_width, x, *more):
        return super().forward(scale, zero_point, bit_width, x) * 1.01


def test_a_quantizer_off_its_grid_is_found() -> None:
    check = TestOwn()
    layer = check.ready()
    tensor_quant = layer.weight_quant.tensor_quant
    tensor_quant.int_quant = OffGrid(tensor_quant.int_quant.narrow_range, signed=True)
    check.ready = lambda: layer
    with pytest.raises(AssertionError, match="off the grid"):
        check.test_values_are_on_the_grid()
