"""GPTQ, GPFQ, Qronos, MagR: contexts and single calls, every weight quantizer."""

import warnings

import pytest
import torch
from torch import nn

from qframework.graph import quantize_model
from qframework.graph.gpfq import gpfq, gpfq_mode
from qframework.graph.gptq import gptq, gptq_mode
from qframework.graph.layer_view import LayerView
from qframework.graph.magr import magr
from qframework.graph.qronos import Qronos, qronos
from qframework.layers import QuantLinear
from qframework.quant_tensor import dequantize
from tests.graph.ptq_network import batches, network, quantized, sqnr

KINDS = [
    "Int8WeightPerTensorFloat",
    "Int8WeightPerChannelFloat",
    "Int8WeightPerChannelFloatMSE",
    "ShiftedUint8WeightPerChannelFloat",
    "Int8WeightPerChannelLSQ",
    "Fp4e2m1OCPWeightPerChannelFloat",
    "MXFloat4e2m1Weight",
    "NVFloat4Weight",
    "NF4WeightPerGroupFloat",
    "Int8WeightPerTensorFixedPoint",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [gptq, gpfq, qronos])
def test_scales_stay_and_a_state_dict_loads_into_a_fresh_model(kind, algorithm) -> None:
    net = network()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    model = quantized(net, kind)
    scales = {
        n: m.quant_weight().scale.clone()
        for n, m in model.named_modules()
        if hasattr(m, "quant_weight")
    }
    done = algorithm(model, batches())
    assert set(done.updated) == {"a", "b", "t", "d", "f"}
    for name, scale in scales.items():
        torch.testing.assert_close(model.get_submodule(name).quant_weight().scale, scale)
    fresh = quantized(network(), kind)
    fresh.load_state_dict(model.state_dict())
    x = batches()[0]
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("algorithm", [gptq, gpfq, qronos])
def test_outputs_come_nearer_to_the_float_models(algorithm) -> None:
    net = network()
    model = quantized(net)
    nearest = sqnr(net, model)
    algorithm(model, batches())
    assert sqnr(net, model) > nearest + 1


@pytest.mark.parametrize(
    "mode", [gptq_mode, gpfq_mode, lambda m: gpfq_mode(m, algorithm_impl=Qronos)]
)
def test_the_loop_gives_what_the_single_call_gives(mode) -> None:
    one, other = quantized(network()), quantized(network())
    from qframework.graph.sequential import quantize_in_order

    quantize_in_order(mode(one), batches())
    with mode(other) as run:
        for _ in range(run.num_layers):
            for x in batches():
                run.model(x)
            run.update()
    assert sqnr(one, other) > 80


def test_the_number_of_blocks_does_not_matter() -> None:
    models = [quantized(network()) for _ in range(2)]
    gptq(models[0], batches(), num_blocks=1)
    gptq(models[1], batches(), num_blocks=50)
    x = batches()[0]
    assert torch.equal(models[0](x), models[1](x))


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = quantized(network())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), gptq_mode(model) as run:
        for x in batches():
            run.model(x)
        run.update()
        raise KeyboardInterrupt
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Conv2d))


def test_layers_that_no_batch_reaches_are_named() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = QuantLinear(4, 4), QuantLinear(4, 4)

        def forward(self, x):
            return self.used(x) if x.sum() > -1e9 else self.unused(x)

    model = Routed().eval()
    with pytest.warns(UserWarning, match="unused: no batch reached it"):
        gptq(model, [torch.randn(8, 4)])
    assert torch.isfinite(model.unused.weight).all()


def test_a_used_up_generator_is_noticed() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = QuantLinear(4, 4), QuantLinear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > -1e9 else x

    with pytest.raises(ValueError, match="used up after its first pass"):
        gptq(Untraceable().eval(), (x for x in [torch.randn(8, 4)]))


def test_quantizers_are_not_called_for_columns(monkeypatch) -> None:
    layer = QuantLinear(64, 8).eval()
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    layer.weight_quant.register_forward_hook(count)
    gptq(layer, [torch.randn(200, 64)])
    assert calls < 10


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_is_a_product_of_its_matrix_and_its_vectors(groups, transposed) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    more = {"output_padding": 1} if transposed else {}
    layer = kind(6, 12, 3, stride=2, padding=1, dilation=1, groups=groups, bias=False, **more)
    x = torch.randn(2, 6, 7, 7)
    view = LayerView(layer)
    matrix = view.to_matrix(layer.weight)
    torch.testing.assert_close(view.from_matrix(matrix), layer.weight)
    wanted = layer(x)
    found = (
        (matrix.transpose(1, 2) @ view.vectors(x))
        .flatten(0, 1)
        .unflatten(1, (2, *wanted.shape[2:]))
    )
    torch.testing.assert_close(found.transpose(0, 1), wanted, atol=1e-5, rtol=1e-5)


def test_magr_makes_the_largest_weights_smaller() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    x = torch.randn(200, 16)
    before, output = layer.weight.abs().amax(1), layer(x).detach()
    magr(layer, [x], alpha=0.01, num_steps=50)
    assert (layer.weight.abs().amax(1) <= before + 1e-6).all()
    assert (layer(x) - output).norm() < 0.1 * output.norm()


def test_layers_keep_nearest_values_where_those_are_better() -> None:
    model = quantized(network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = gptq(model, batches(), keep_best=True)
    assert all(after <= before for before, after in done.errors.values())
    assert torch.isfinite(dequantize(model.f.quant_weight())).all()


def test_tied_weights_stay_tied_and_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    net[2].weight = net[0].weight
    model, _ = quantize_model(net, weight_bit_width=4, input_quant=None, act_quant=None)
    with pytest.warns(UserWarning, match="its weight is 2.weight too"):
        done = gptq(model, [torch.randn(32, 8)])
    assert done.updated == ["3"]
    assert model[0].weight is model[2].weight
    fresh, _ = quantize_model(net, weight_bit_width=4, input_quant=None, act_quant=None)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), model(x))
