"""Layers that return plain tensors take short ways; nothing that a user changes or listens to is missed."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import qframework
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.proxy import ActQuantProxyFromInjector
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

LARGE = (64, 16, 16)


def settled(layer: nn.Module, *shape: int) -> nn.Module:
    """A layer in evaluation that has run often enough to take its shortest way."""
    torch.manual_seed(0)
    for _ in range(3):
        layer(torch.randn(*shape))
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(*shape))
    return layer


@pytest.mark.parametrize("kernels", ["auto", "fused", "reference"])
@pytest.mark.parametrize("shape", [(2, 5), LARGE])
def test_values_are_those_of_the_quantized_tensor(kernels, shape) -> None:
    with qframework.settings.use(kernels=kernels), torch.no_grad():
        for make in (QuantReLU, QuantIdentity):
            layer = settled(make(collect_stats_steps=1), *shape)
            x = torch.randn(*shape) * 3
            for values in (x, x.transpose(0, -1), x.double(), x.bfloat16(), x[::2]):
                plain = layer(values)
                layer.return_quant_tensor = True
                record = layer(values)
                layer.return_quant_tensor = False
                assert isinstance(record, IntQuantTensor)
                assert torch.equal(plain, record.value)
                assert plain.dtype == values.dtype


@torch.no_grad()
def test_threads_may_share_a_layer() -> None:
    layer = settled(QuantReLU(collect_stats_steps=1), *LARGE)
    inputs = [torch.randn(*LARGE) * (1 + i) for i in range(8)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for a, b in zip(pool.map(layer, inputs), expected, strict=True):
                assert torch.equal(a, b)


PARTS = {
    "proxy": lambda layer: layer.act_quant,
    "activation": lambda layer: layer.act_quant.activation_impl,
    "quantizer": lambda layer: layer.act_quant.tensor_quant,
    "scaling": lambda layer: layer.act_quant.tensor_quant.scaling_impl,
}


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_see_each_call_whenever_they_were_registered(part, before) -> None:
    layer = settled(QuantReLU(collect_stats_steps=1), *LARGE)
    seen, x = [], torch.randn(*LARGE)
    module = PARTS[part](layer)
    if before:
        handle = module.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        handle = module.register_forward_hook(lambda *_: seen.append(1))
    layer(x), layer(x)
    assert len(seen) == 2
    handle.remove()
    layer(x)
    assert len(seen) == 2


@torch.no_grad()
def test_a_hook_of_all_modules_sees_the_proxies() -> None:
    model = nn.Sequential(QuantLinear(16, 16), QuantReLU(collect_stats_steps=1))
    settled(model, 64, 64, 16)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(torch.randn(64, 64, 16))
    finally:
        handle.remove()
    assert {"WeightQuantProxyFromInjector", "ActQuantProxyFromInjector"} <= set(seen)


class Doubling(ActQuantProxyFromInjector):
    """Does more than its base with the result of the quantizer."""

    def _wrap(self, output, x):
        return super()._wrap((output[0] * 2, *output[1:]), x)


class Negating(ActQuantProxyFromInjector):
    """Does more than its base with the call."""

    def forward(self, x):
        return super().forward(-x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Doubling, Negating])
def test_a_proxy_of_ones_own_is_called_as_a_whole(kind) -> None:
    quantizer = Int8ActPerTensorFloat.let(proxy_class=kind)
    layer = settled(QuantIdentity(act_quant=quantizer, collect_stats_steps=1), *LARGE)
    x = torch.randn(*LARGE)
    assert torch.equal(layer(x), layer.act_quant(x).value)


@torch.no_grad()
def test_a_weight_of_ones_own_is_used() -> None:
    class Halved(QuantLinear):
        def quant_weight(self, quant_input=None):
            return super().quant_weight(quant_input).value / 2

    torch.manual_seed(0)
    layer, x = Halved(8, 8, bias=False).eval(), torch.randn(4, 8)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.quant_weight()))


@torch.no_grad()
def test_a_weight_of_one_layers_own_is_used_from_then_on() -> None:
    layer, x = settled(QuantLinear(8, 8, bias=False), 4, 8), torch.randn(4, 8)
    layer.quant_weight = lambda quant_input=None: torch.eye(8)
    assert torch.equal(layer(x), x)


def test_backward_hooks_are_heard_on_proxies_that_quantize_and_on_those_that_do_not() -> None:
    layer, x = QuantLinear(8, 8), torch.randn(4, 8, requires_grad=True)
    seen = []
    layer.input_quant.register_full_backward_hook(lambda *_: seen.append("input"))
    layer.weight_quant.tensor_quant.register_full_backward_pre_hook(
        lambda *_: seen.append("weight")
    )
    for _ in range(2):
        layer(x).sum().backward()
    assert sorted(seen) == ["input", "input", "weight", "weight"]


@torch.no_grad()
def test_quantizers_that_come_later_are_used() -> None:
    layer, x = settled(QuantConv2d(4, 4, 3), 2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    before = layer(x)
    other = QuantConv2d(
        4, 4, 3, input_quant=Int8ActPerTensorFloat, output_quant=Uint8ActPerTensorFloat
    )
    settled(other, 2, 4, 8, 8)
    layer.input_quant = other.input_quant
    quantized = layer(x)
    assert not torch.equal(quantized, before)
    layer.output_quant = other.output_quant
    assert layer(x).min() >= 0
    layer.input_quant.disable_quant = layer.output_quant.disable_quant = True
    assert torch.equal(layer(x), before)
    layer.input_quant.disable_quant = False
    assert torch.equal(layer(x), quantized)


@torch.no_grad()
def test_a_bias_that_comes_later_is_added_and_quantized() -> None:
    quantized = QuantLinear(8, 8, bias=False, bias_quant=None)
    settled(quantized, 4, 8)
    x = torch.randn(4, 8)
    before = quantized(x)
    quantized.bias = nn.Parameter(torch.arange(8.0))
    torch.testing.assert_close(quantized(x), before + torch.arange(8.0))
    assert isinstance(quantized(x), torch.Tensor)


@torch.no_grad()
def test_settings_that_change_are_followed() -> None:
    layer, x = settled(QuantReLU(collect_stats_steps=1), *LARGE), torch.randn(*LARGE)
    with qframework.settings.use(kernels="auto"):
        expected = layer(x)
    for kernels, path in (
        ("fused", "fused: quantize_by_learned_scale"),
        ("reference", "composed: settings.kernels is 'reference'"),
        ("auto", "quantize_by_learned_scale"),
    ):
        with qframework.settings.use(kernels=kernels):
            assert torch.equal(layer(x), expected)
            assert path in layer.act_quant.path(x)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [
        (lambda: QuantReLU(collect_stats_steps=1), LARGE, 27),
        (lambda: QuantConv2d(4, 4, 3, bias=False), (2, 4, 8, 8), 25),
        (lambda: QuantLinear(16, 16), (2, 16), 25),
    ],
)
def test_a_frozen_layer_takes_few_frames_of_python(make, shape, most) -> None:
    layer, x = settled(make(), *shape), torch.randn(*shape)
    with qframework.settings.use(kernels="auto"), qframework.frozen(layer):
        layer(x)
        calls = []

        def count(frame, event, _):
            if event == "call":
                calls.append(frame.f_code.co_qualname)

        gc.collect()
        gc.disable()  # else what is collected here, of other tests, counts as well
        sys.setprofile(count)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
            gc.enable()
    assert len(calls) <= most, "\n".join(calls)
