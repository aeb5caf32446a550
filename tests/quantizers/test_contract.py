"""Every predefined quantizer keeps the contract that a researcher's own is put through."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FunctionType

import pytest

from qframework import quantizers
from qframework.core.function_wrapper import CeilSte
from qframework.core.quant import IntQuant
from qframework.inject.resolver import Resolver
from qframework.quantizers import Int8WeightPerTensorFloat, QuantSolver
from qframework.testing import QuantizerContract

sys.path.insert(0, str(Path(__file__).parent))
from required import keywords_of, shape_of

#: Compiled and exported here; the others are where they are tested.
SLOW = {
    "Int8WeightPerTensorFloat",
    "Uint8ActPerTensorLSQ",
    "TruncTo8bit",
    "Int8Bias",
    "Fp8e4m3OCPWeightPerChannelFloat",
    "Fp8e5m2OCPActPerTensorFloat",
    "Fp4e2m1OCPWeightPerTensorFloatMSE",
    "MXFloat4e2m1Weight",
    "MXFloat8e4m3Act",
    "MXInt8OCPAct",
    "ShiftedMXUInt8Weight",
    "NVFloat4Weight",
    "NF4WeightPerGroupFloat",
    "APoT4ActPerTensorFloat",
}
#: Compiled in tests/kernels/test_graphs_of_formats.py each time, with gradients.
COMPILED_ELSEWHERE = {
    "Fp8e4m3OCPWeightPerChannelFloat",
    "MXFloat8e4m3Act",
    "NVFloat4Weight",
    "NF4WeightPerGroupFloat",
}


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
    body = {
        "quantizer": getattr(quantizers, name),
        "keywords": keywords_of(name),
        "shape": shape_of(name),
        "__module__": __name__,
    }
    made = type(f"Test{name}", (QuantizerContract,), body)
    if name not in SLOW:
        made.test_exports = made.test_compiled_is_eager = None
    elif name in COMPILED_ELSEWHERE:
        made.test_compiled_is_eager = marked(made.test_compiled_is_eager, pytest.mark.exhaustive)
    if (
        made.test_traces_as_one_graph is not None
    ):  # some each time: it takes as long as all others together
        made.test_traces_as_one_graph = marked(made.test_traces_as_one_graph, pytest.mark.table(8))
    return made


def marked(test: FunctionType, mark: pytest.MarkDecorator) -> FunctionType:
    """The same test with a mark of its own."""
    own = FunctionType(
        test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__
    )
    functools.update_wrapper(own, test)
    own.pytestmark = list(getattr(test, "pytestmark", ()))
    return mark(own)


globals().update({f"Test{name}": contract(name) for name in predefined()})


def test_all_families_are_there() -> None:
    found = predefined()
    assert len(found) > 200
    for part in (
        "MSE",
        "HQO",
        "LSQ",
        "PACT",
        "DoReFa",
        "Accumulator",
        "Dynamic",
        "Bias",
        "Trunc",
        "OCP",
        "FNUZ",
        "MX",
        "NVFloat4",
        "PerGroup",
        "NF4",
        "APoT",
    ):
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
    with pytest.raises(pytest.fail.Exception, match="off the grid"):
        check.test_values_are_on_the_grid()
