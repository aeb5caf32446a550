"""The documented defaults are those in effect."""

import importlib
import pkgutil

import pytest

from qframework import core
from qframework.inject.expressions import Value, arguments_of
from qframework.inject.policy import Policy
from qframework.layers import QuantLinear
from qframework.quantizers import (
    AccumulatorAwareWeightQuant,
    ActQuantSolver,
    AdditivePowersOfTwo,
    BiasQuantSolver,
    FloatBase,
    Int8ActPerTensorFloat,
    SignedTernaryWeightPerTensorConst,
    TruncQuantSolver,
    WeightQuantSolver,
)

REQUIRED = object()
DERIVED = {
    "scaling_per_output_channel",
    "per_channel_broadcastable_shape",
}  # read by solvers' functions alone


def in_effect(name: str) -> list[object]:
    """What constructors and solvers give to a name that nobody binds."""
    found: list[object] = []
    for info in pkgutil.walk_packages(core.__path__, "qframework.core."):
        for cls in vars(importlib.import_module(info.name)).values():
            if isinstance(cls, type) and cls.__module__ == info.name:
                arguments = [a for a in arguments_of(cls) or () if a.name == name]
                found += [REQUIRED if a.required else a.default for a in arguments]
    for solver in (
        WeightQuantSolver,
        ActQuantSolver,
        BiasQuantSolver,
        TruncQuantSolver,
        AccumulatorAwareWeightQuant,
        FloatBase,
        AdditivePowersOfTwo,
    ):
        binding = solver.__bindings__.get(name)
        if binding is not None and not isinstance(binding.bound, Value):
            found.append(binding.bound)
    return found


@pytest.mark.parametrize("name", sorted(Policy.model_fields.keys() - DERIVED))
def test_the_documented_default_is_the_one_in_effect(name) -> None:
    field, found = Policy.model_fields[name], in_effect(name)
    if field.is_required():
        assert not found or REQUIRED in found
    else:
        assert field.default in found


@pytest.mark.parametrize("name", sorted(Policy.model_fields))
def test_every_policy_says_what_it_means(name) -> None:
    assert len(Policy.model_fields[name].description or "") > 15


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("weight_scaling_min_val", float("inf")),
        ("weight_scaling_min_val", float("nan")),
        ("input_scaling_stats_momentum", True),
        ("weight_threshold", True),
    ],
)
def test_numbers_that_would_ruin_all_values_are_refused(keyword, value) -> None:
    quantizers = (
        {"weight_quant": SignedTernaryWeightPerTensorConst} if "threshold" in keyword else {}
    )
    with pytest.raises(ValueError, match=f"QuantLinear.*{keyword}={value}"):
        QuantLinear(4, 3, input_quant=Int8ActPerTensorFloat, **quantizers, **{keyword: value})
