"""What graphs of torch.compile compute is what eager mode computes: values bit for bit, gradients within 1e-6."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import qframework
from qframework.functional import (
    LargestScaled,
    fake_quantize,
    quantize_by_largest,
    stored_scale,
    traced_largest,
)
from tests.functional.test_fused import values

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def auto() -> None:
    with qframework.settings.use(kernels="auto"):
        yield


def compare(traced, composed, *tensors: torch.Tensor) -> str:
    """Compare a function that is compiled with a composed one; its gradients in float64 are what counts.

    Returns:
        The code that the compiler made.
    """
    leaves = [t.clone().requires_grad_() for t in tensors]
    compiled = torch.compile(traced, fullgraph=True, dynamic=False)

    def run() -> tuple:
        out = compiled(*leaves)
        (out * upstream).sum().backward()
        return out.detach()

    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(3))
    out, code = run_and_get_code(run)
    with qframework.settings.use(kernels="reference"):
        assert torch.equal(out, composed(*tensors))
        wide = [t.double().requires_grad_() for t in tensors]
        (composed(*wide) * upstream).sum().backward()
    for leaf, expected in zip(leaves, wide, strict=True):
        # A sum of numbers of both signs may come out near 0: relative to the size that it has by chance.
        size = max(expected.grad.norm().item(), upstream.double().norm().item())
        assert (leaf.grad.double() - expected.grad).norm() <= 1e-6 * size
    return "".join(code)


@pytest.mark.parametrize("shape", [(4, 16, 9, 11), (6, 33, 40), (64, 50)])
@pytest.mark.parametrize("bounds", [(0.0, 15.0), (-7.0, 7.0)])
@pytest.mark.parametrize("rectify", [False, True])
def test_a_range(shape, bounds, rectify) -> None:
    threshold = torch.tensor(15.0)

    def traced(x, stored):
        scale = stored_scale(stored, threshold, minimum=0.01)
        return fake_quantize(x, scale, None, *bounds, rectify=rectify)

    def composed(x, stored):
        scale = stored.abs().clamp_min(0.01) / 15
        return fake_quantize(torch.relu(x) if rectify else x, scale, None, *bounds)

    compare(traced, composed, values(shape), torch.tensor(3.75))


def test_a_range_with_a_zero_point_and_scales_of_channels() -> None:
    def quantize(x, scale, zero):
        return fake_quantize(x, scale, zero, 0.0, 15.0)

    scale = torch.tensor([0.25, 0.5, 0.125]).reshape(1, 3, 1, 1)
    compare(quantize, quantize, values((4, 3, 8, 8)), torch.tensor(0.25), torch.tensor(6.0))
    compare(quantize, quantize, values((4, 3, 8, 8)), scale, scale * 16)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (24, 32)])
@pytest.mark.parametrize("domain", ["fp", "power_of_two"])
def test_a_weight(per_channel, shape, domain) -> None:
    x, threshold = values(shape), torch.tensor(8.0)
    x.view(-1)[[5, 77]] = x.abs().max() + 1  # shared by two, in one channel or in two
    scale_shape = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    how = LargestScaled(-7.0, 7.0, "round", domain, "ceil", 0.01, scale_shape, None, per_channel)

    def traced(x):
        return traced_largest(x, threshold, how)[0]

    def composed(x):
        return quantize_by_largest(x, threshold.to(x.dtype), how)[0]

    compare(traced, composed, x)


def test_the_scale_is_computed_once_and_no_boolean_tensor_is_kept() -> None:
    threshold = torch.tensor(255.0)

    def traced(x, stored):
        x = x * 1.5 + 0.5  # such as a norm
        return fake_quantize(x, stored_scale(stored, threshold), None, 0.0, 255.0, rectify=True)

    def composed(x, stored):
        scale = stored.abs() / 255
        return fake_quantize(torch.relu(x * 1.5 + 0.5), scale, None, 0.0, 255.0)

    code = compare(traced, composed, values((4, 16, 8, 8)), torch.tensor(31.875))
    assert not re.search(r"bool\*", code)
    loops = [part for part in code.split("for(int64_t")[1:] if "round()" in part]
    assert loops
    for loop in loops:  # the division of a scale by its threshold is outside
        assert "std::abs" not in loop.split("store(")[0]
