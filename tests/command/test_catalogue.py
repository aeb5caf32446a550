"""The catalogue and its filters."""

import pytest

from qframework import quantizers
from qframework.command import catalogue, choose
from qframework.quantizers import QuantSolver


def names(**how: object) -> set[str]:
    return {e.name for e in choose(catalogue(), **how)}


def test_every_predefined_quantizer_is_in_it_once() -> None:
    found = [e.name for e in catalogue()]
    expected = [
        n for n in quantizers.__all__
        if issubclass(getattr(quantizers, n), QuantSolver) and not n.endswith("Solver")
    ]  # fmt: skip
    assert found == expected and len(set(found)) == len(found)


def test_filters_hold_all_at_once() -> None:
    found = choose(catalogue(), role="weight", bits=8, per="channel", scale="stats max")
    assert "Int8WeightPerChannelFloat" in {e.name for e in found}
    assert all(e.role == "weight" and e.bits == 8 and e.granularity == "channel" for e in found)
    assert names(role="act") == names(role="activation")
    assert names(per="group") >= {"Int8WeightPerGroupFloat", "MXFloat4e2m1Weight"}
    assert names(text="dorefa") >= {
        "BinaryWeightPerTensorDoReFa", "Uint8WeightPerTensorDoReFa", "Uint8ActPerTensorDoReFa",
    }  # fmt: skip


def test_bits_are_those_of_an_element() -> None:
    bits = {e.name: e.bits for e in catalogue()}
    assert bits["Int32Bias"] == 32 and bits["IntBias"] is None
    assert bits["SignedBinaryWeightPerTensorConst"] == 1
    assert bits["NF4WeightPerGroupFloat"] == 4 and bits["MXFloat6e3m2Weight"] == 6
    assert bits["NoneWeightQuant"] is None


@pytest.mark.parametrize("how", [{"role": "wheel"}, {"per": "block"}, {"role": ""}])
def test_what_there_is_not_is_refused_with_what_there_is(how) -> None:
    with pytest.raises(ValueError, match=r"allowed: (weight|tensor), "):
        names(**how)
