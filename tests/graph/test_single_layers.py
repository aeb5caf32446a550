"""A model that is a single layer: passes do what there is to do, or say why nothing is."""

import copy
import warnings

import pytest
import torch
from torch import nn

from qframework.graph import calibration_mode, ptq, quantize_model
from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.awq import awq
from qframework.graph.channel_splitting import GraphChannelSplitting
from qframework.graph.equalize import (
    EqualizeGraph,
    GraphRotationEqualization,
    LayerNormToRMS,
    LayerwiseActivationRotation,
    MergeLnAffine,
)
from qframework.graph.gpfq import gpfq
from qframework.graph.gptq import gptq
from qframework.graph.quantizers_off import quantizers_off
from qframework.graph.single_layers import is_single_layer
from qframework.graph.standardize import MergeBatchNorm
from qframework.graph.svd_quant import LayerwiseLowRankCorrection

SIZE = 16
IMAGE = (2, 4, 8, 8)
LAYERS = {
    "Linear": lambda: (nn.Linear(SIZE, SIZE), (3, 5, SIZE)),
    "Conv2d": lambda: (nn.Conv2d(4, 8, 3), IMAGE),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(4, 8, 3), IMAGE),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(4), IMAGE),
    "LayerNorm": lambda: (nn.LayerNorm(SIZE), (3, 5, SIZE)),
    "GELU": lambda: (nn.GELU(), (3, 5, SIZE)),
    "LSTM": lambda: (nn.LSTM(SIZE, SIZE), (3, 5, SIZE)),
    "MultiheadAttention": lambda: (nn.MultiheadAttention(SIZE, 4), (5, 3, SIZE)),
}
PASSES = (
    EqualizeGraph,
    MergeLnAffine,
    LayerNormToRMS,
    GraphChannelSplitting,
    MergeBatchNorm,
    lambda: GraphRotationEqualization(orphan_sink=True),
    LayerwiseActivationRotation,
)
every_layer = pytest.mark.parametrize("kind", LAYERS)


def made(kind):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    x = torch.randn(shape) * (torch.arange(shape[-1]) + 1)
    return layer.eval(), (x, x, x) if kind == "MultiheadAttention" else (x,)


@torch.no_grad()
def result(layer, given):
    out = layer(*given)
    return out[0] if isinstance(out, tuple) else out


@every_layer
@pytest.mark.parametrize("make", PASSES, ids=lambda m: getattr(m, "__name__", m))
def test_a_pass_changes_it_or_says_why_not_without_a_sample(kind, make) -> None:
    layer, given = made(kind)
    before, run = result(layer, given), make()
    after = run.apply(layer)
    torch.testing.assert_close(result(after, given), before, rtol=1e-5, atol=1e-5)
    assert run.report.changed or run.report.skipped
    assert all(run.report.skipped.values()) and "computed" not in str(run.report)
    assert str(run.report).count("\n: ") == 0


@every_layer
@pytest.mark.parametrize("layerwise", (True, False))
def test_smoothing_changes_it_or_says_why_not(kind, layerwise) -> None:
    layer, given = made(kind)
    before = result(layer, given)
    with activation_equalization_mode(layer, 0.5, layerwise=layerwise) as mode:
        result(layer, given)
    torch.testing.assert_close(result(layer, given), before, rtol=1e-5, atol=1e-5)
    assert mode.report.changed or mode.report.skipped


@pytest.mark.parametrize("run", ("equalized", "smoothed"))
def test_what_is_within_attention_is_evened_out(run) -> None:
    layer, given = made("MultiheadAttention")
    with torch.no_grad():
        layer.out_proj.weight.mul_(torch.exp(torch.randn(SIZE)))
    before, weight = result(layer, given), layer.out_proj.weight.detach().clone()
    if run == "equalized":
        EqualizeGraph().apply(layer)
    else:
        with activation_equalization_mode(layer, 0.5, layerwise=False):
            result(layer, given)
    torch.testing.assert_close(result(layer, given), before)
    spread = [
        (w.abs().amax(0).max() / w.abs().amax(0).min()) for w in (weight, layer.out_proj.weight)
    ]
    assert spread[1] < spread[0] / 2


def test_a_rotation_in_front_stands_for_it() -> None:
    layer = made("Linear")[0]
    run = LayerwiseActivationRotation()
    assert run.apply(layer) is not layer and run.report.changed == {
        "": "input turned when it is called"
    }
    odd = nn.Linear(SIZE + 1, 3)
    assert run.apply(odd) is odd and "Hadamard" in run.report.skipped[""]


@every_layer
@pytest.mark.parametrize("algorithm", (gptq, gpfq, awq, LayerwiseLowRankCorrection))
def test_algorithms_on_quantized_weights_change_it_or_say_why_not(kind, algorithm) -> None:
    layer, given = made(kind)
    quantized, _ = quantize_model(layer, weight_bit_width=4)
    with torch.no_grad(), calibration_mode(quantized):
        quantized(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low_rank = algorithm is LayerwiseLowRankCorrection
        done = algorithm(quantized) if low_rank else algorithm(quantized, [given])
    if low_rank:
        changed, skipped = done.names, done.skipped
    elif algorithm is awq:
        changed, skipped = done.report.changed, done.report.skipped
    else:
        changed, skipped = done.updated, done.failed
    why = skipped.values()
    assert changed or any("single layer" in w or "no scale or bound" in w for w in why)


def test_awq_scales_the_values_within_quantized_attention() -> None:
    layer, given = made("MultiheadAttention")
    quantized, _ = quantize_model(layer, weight_bit_width=3)
    with quantizers_off(quantized):
        before = result(quantized, given)
    done = awq(quantized, [given], grid=8, clip=False)
    assert done.report.way == "traced" and set(done.errors) == {"in_proj", "out_proj"}
    with quantizers_off(quantized):
        torch.testing.assert_close(result(quantized, given), before, rtol=1e-4, atol=1e-4)
    assert not any(n == "out_proj.change" for n, _ in quantized.named_modules())


def test_a_recipe_tells_the_reason() -> None:
    layer, given = made("LSTM")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, report = ptq(layer, [given], "w4a8-gptq")
    texts = [str(w.message) for w in told]
    assert any("gptq changed nothing: the model: the model is a single layer" in t for t in texts)
    assert not any("merge_batch_norm" in t for t in texts)
    assert "(the model): the model is a single layer" in str(report)


def test_containers_and_classes_of_ones_own_are_no_single_layers() -> None:
    class Own(nn.Linear):
        pass

    encoder = nn.TransformerEncoderLayer(SIZE, 4, 8, batch_first=True)
    for model in (nn.Sequential(nn.Linear(2, 2)), Own(2, 2), encoder):
        assert not is_single_layer(model)
    hooked = copy.deepcopy(encoder)
    assert is_single_layer(quantize_model(hooked)[0])
