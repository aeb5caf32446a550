"""Activations quantized by a percentile of their own magnitudes, as a collection goes on, in one step."""

import copy
from collections.abc import Iterator

import pytest
import torch
from kernel_case import assert_as_defined, values
from torch import Tensor

import qframework
from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    fake_quantize,
    high_rank,
    quantize_by_percentile,
)
from qframework.kernels.native import tensors
from qframework.layers import QuantIdentity, QuantReLU
from qframework.quantizers import Uint8ActPerTensorFixedPoint

LARGE = (9, 37, 1021)
RULE = ScaleRule("learned", 128.0, minimum=0.01)


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield


def serves(x: Tensor, rank: int, grid: IntegerGrid, relu: bool) -> bool:
    return any(k.serves(x, rank, grid, RULE, relu) for k in quantize_by_percentile.kernels)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("clamp_gradient", [False, True])
def test_a_percentile_quantizes_as_written_out(relu, clamp_gradient) -> None:
    bounds = (0.0, 255.0) if relu else (-128.0, 127.0)
    grid = IntegerGrid(*bounds, "round", clamp_gradient)
    x = values(*LARGE).clamp(-15, 15)
    x.view(-1)[[7, 3000, 70000]] = torch.tensor([20.0, 16.0, 24.0])
    rank = x.numel() - 2  # that of 16

    def written_out(x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(x) if relu else x
        scale = x.abs().flatten().sort().values[-3] / 128
        return fake_quantize(x, scale, None, grid), scale

    assert serves(x, rank, grid, relu) == (clamp_gradient or not relu)
    assert_as_defined(
        lambda x: quantize_by_percentile(x, rank, grid, RULE, relu)[:2], x, expected=written_out
    )
    assert quantize_by_percentile(x, rank, grid, RULE, relu)[2] == 16.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank_from_top", [1, 3, 5000])
def test_one_bad_element_of_many_is_told(bad, rank_from_top) -> None:
    x = values(*LARGE)
    x.view(-1)[777] = bad
    wide = IntegerGrid(-128.0, 127.0)
    assert not quantize_by_percentile(x, x.numel() + 1 - rank_from_top, wide, RULE)[3]
    # what a ReLU takes away isn't seen
    seen = quantize_by_percentile(x, x.numel() - 2, IntegerGrid(0.0, 255.0), RULE, True)[3]
    assert bool(seen) == (bad == -float("inf"))


def test_small_tensors_and_ranks_in_the_middle_are_left_to_the_definition() -> None:
    grid = IntegerGrid(-128.0, 127.0)
    large, small = values(*LARGE), values(30, 100)
    assert serves(large, large.numel(), grid, False)
    assert not serves(large, large.numel() // 2, grid, False)
    assert not serves(small, small.numel(), grid, False)
    for x, rank in ((large, large.numel() // 2), (small, small.numel() - 1)):
        y, scale, magnitude, finite = quantize_by_percentile(x, rank, grid, RULE)
        assert finite and magnitude == x.abs().flatten().sort().values[rank - 1]
        assert torch.equal(scale, magnitude / 128)
        assert torch.equal(y, fake_quantize(x, scale, None, grid))


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantReLU(collect_stats_steps=3),
        lambda: QuantIdentity(collect_stats_steps=3),
        lambda: QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, collect_stats_steps=3),
    ],
)
def test_a_layer_collects_and_learns_as_without_kernels(make) -> None:
    """The scale of a batch is that of its percentile, in the domain of plain numbers, whatever that of the learned one."""
    layer = make().double()
    composed = copy.deepcopy(layer)
    found = {}
    for kernels, one in ((qframework.settings.kernels, layer), ("reference", composed)):
        with qframework.settings.use(kernels=kernels):
            outs = []
            for seed in range(5):
                x = values(4, 8, 40, 40, step=1 / 1024, seed=seed).double().requires_grad_()
                y = one(x)
                outs.append((y.detach(), torch.autograd.grad((y * y.detach().cos()).sum(), x)[0]))
        found[kernels] = outs
    for (y, grad), (z, other) in zip(*found.values(), strict=True):
        assert torch.equal(y, z)
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9)
    mine, theirs = layer.state_dict(), composed.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


def test_the_rank_is_that_of_the_percentile_of_the_quantizer() -> None:
    layer = QuantReLU(collect_stats_steps=3, high_percentile_q=99.99)
    x = values(*LARGE)
    layer(x)
    scaling = layer.act_quant.tensor_quant.scaling_impl
    ordered = torch.relu(x).flatten().sort().values
    assert scaling.running_stats == ordered[high_rank(99.99, x.numel()) - 1]
