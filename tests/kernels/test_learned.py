"""Activations quantized by a learned scale in one step, against the same written out."""

from collections.abc import Iterator

import pytest
import torch
from kernel_case import assert_as_defined, kept_by, values
from torch import Tensor

import qframework
from qframework.functional import (
    IntegerGrid,
    ScaleRule,
    fake_quantize,
    learned_scale,
    quantize_by_learned_scale,
)
from qframework.kernels.native import tensors

GRID = IntegerGrid(0.0, 15.0)
LARGE = (9, 37, 1021)


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param):
        yield


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_learned_scale_quantizes_as_written_out(shape, relu) -> None:
    rule = ScaleRule("learned", 16.0, minimum=1e-10)

    def written_out(x: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        scale = stored.abs() / 16
        x = torch.relu(x) if relu else x
        return fake_quantize(x, scale, None, GRID), scale

    assert_as_defined(
        lambda x, stored: quantize_by_learned_scale(x, stored, GRID, rule, relu),
        values(*shape),
        torch.tensor(4.0),
        expected=written_out,
    )


@pytest.mark.parametrize("domain", ["fp", "log_fp", "power_of_two"])
def test_the_scale_is_that_of_the_stored_number(domain) -> None:
    rule = ScaleRule("learned", 16.0, domain, minimum=0.01)
    x, stored = values(5, 40), torch.tensor(1.3)
    with torch.no_grad():
        y, scale = quantize_by_learned_scale(x, stored, GRID, rule)
        assert torch.equal(scale, learned_scale(stored, rule))
        assert torch.equal(y, fake_quantize(x, scale, None, GRID))


def test_one_tensor_is_kept_for_the_backward_pass() -> None:
    x, stored = torch.randn(64, 64, requires_grad=True) * 1.0, torch.tensor(2.0, requires_grad=True)
    rule = ScaleRule("learned", 255.0)
    grid = IntegerGrid(0.0, 255.0)
    kept = kept_by(lambda: quantize_by_learned_scale(x, stored, grid, rule, True))
    assert sorted(t.numel() for t in kept) == [1, 1, 4096]
