"""Every predefined quantizer builds, trains a step, survives a state dict and gives valid tensors."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qframework.quantizers as predefined
from qframework.inject import Injector
from qframework.layers import QuantIdentity, QuantLinear
from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.quant_tensor import IntQuantTensor

sys.path.insert(0, str(Path(__file__).parent))
from required import keywords_of, shape_of


def named(kind: type) -> list[str]:
    out = []
    for name in predefined.__all__:
        quantizer = getattr(predefined, name)
        whole = issubclass(quantizer, predefined.QuantSolver) and not name.startswith("None")
        if name.endswith("Solver") or not whole:
            continue
        if issubclass(quantizer.proxy_class, kind):
            out.append(name)
    return out


def build(name: str) -> nn.Module:
    quantizer, extra = getattr(predefined, name), keywords_of(name)
    torch.manual_seed(0)
    if name in named(ActQuantProxyFromInjector):
        layer = QuantIdentity(act_quant=quantizer, return_quant_tensor=True, **extra)
        return nn.Sequential(layer)
    role = "weight" if name in named(WeightQuantProxyFromInjector) else "bias"
    extra = {f"{role}_{k}": v for k, v in extra.items()}
    act = predefined.Int8ActPerTensorFloat
    return nn.Sequential(
        QuantLinear(16, 5, input_quant=act, **{f"{role}_quant": quantizer}, **extra)
    )


def sample(name: str) -> torch.Tensor:
    return torch.randn(shape_of(name))


ALL = [
    name
    for kind in (
        WeightQuantProxyFromInjector,
        BiasQuantProxyFromInjector,
        ActQuantProxyFromInjector,
    )
    for name in named(kind)
]


def test_every_exported_name_is_a_quantizer() -> None:
    assert all(issubclass(getattr(predefined, n), Injector) for n in predefined.__all__)
    assert len(ALL) > 200


@pytest.mark.parametrize("name", ALL)
def test_it_trains_a_step_and_survives_a_state_dict(name) -> None:
    model, x = build(name), sample(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if list(model.parameters()) else None
    out = model(x.requires_grad_())
    loss = (out.value if hasattr(out, "value") else out).pow(2).sum()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.eval()
    other = build(name)
    other.load_state_dict(model.state_dict())
    other.eval()
    first, second = model(x), other(x)
    assert torch.equal(getattr(first, "value", first), getattr(second, "value", second))
    layer = model[0]
    quantized = {
        "QuantIdentity": lambda: first,
        "QuantLinear": lambda: layer.quant_weight(layer.input_quant(x)),
    }[type(layer).__name__]()
    assert quantized.is_valid
    if isinstance(quantized, IntQuantTensor):
        assert quantized.int().dtype in (torch.int8, torch.uint8)
    assert name in str(layer.explain())
    assert len(repr(layer).splitlines()) <= 4


@torch.no_grad()
def write(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key in state:
            tensor.copy_(state[key])


@pytest.mark.parametrize("name", ALL)
def test_one_that_was_built_on_meta_gives_what_it_is_given(name) -> None:
    model, x = build(name), sample(name)
    model(x), model.eval()
    state, expected = model.state_dict(), model(x)
    with torch.device("meta"):
        models = [build(name) for _ in range(3)]
    models[0].load_state_dict(state, assign=True)
    for other in models[1:]:
        other.to_empty(device="cpu")
    models[1].load_state_dict(state)
    write(models[2], state)
    for other in models:
        found = other.eval()(x)
        assert torch.equal(getattr(expected, "value", expected), getattr(found, "value", found))


INTEGERS = ("ActQuantProxyFromInjector", "DynamicActQuantProxyFromInjector")


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in named(ActQuantProxyFromInjector)
        if getattr(predefined, n).proxy_class.__name__ in INTEGERS
    ],
)
def test_activations_are_nearest_points_within_range(name) -> None:
    model, x = build(name).eval(), sample(name)
    model.train()
    for _ in range(3):
        model(x)
    q = model.eval()(x)
    if "Binary" in name:
        assert torch.equal(q.value, torch.where(x >= 0, 1.0, -1.0) * q.scale)
        return
    exact = x / q.scale + q.zero_point
    low, high = (-128, 127) if q.signed else (0, 255)
    if "Ternary" in name:
        low, high = -1, 1
    integers = q.int().to(torch.float32)
    assert ((integers - exact.clamp(low, high)).abs() <= 0.5 + 1e-4).all()


weights = st.lists(
    st.one_of(
        st.floats(-10, 10, width=32),
        st.sampled_from([0.0, 1e-30, -1e-30, 1e30, -1e30, 3.0, -3.0]),
    ),
    min_size=12,
    max_size=12,
)


@given(
    weights,
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from(["tensor", "channel"]),
    st.sampled_from(
        [
            "Int8WeightPerTensorFloat",
            "Int8WeightPerTensorFixedPoint",
            "ShiftedUint8WeightPerTensorFloat",
        ]
    ),
)
def test_any_weight_becomes_its_nearest_points(numbers, bits, narrow, granularity, name) -> None:
    layer = QuantLinear(
        4,
        3,
        weight_quant=getattr(predefined, name),
        weight_bit_width=bits,
        weight_narrow_range=narrow,
        weight_scaling_per_output_type=granularity,
    )
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(numbers).reshape(3, 4))
    q = layer.quant_weight()
    assert q.is_valid
    assert q.bit_width.item() == bits
    with torch.no_grad():
        # Clipped by at most a step: the positive end of a full signed range, a power of two's narrow range, a rounded
        # zero point. A narrow range with a float scale clips nothing.
        slack = 0.5 if narrow and name == "Int8WeightPerTensorFloat" else 1.0
        assert ((q.value - layer.weight).abs() <= slack * 1.001 * q.scale + 1e-37).all()
        again = layer.weight_quant.tensor_quant.int_quant(
            q.scale, q.zero_point, q.bit_width, q.value
        )
        assert torch.equal(again, q.value)
