"""What graphs of torch.compile compute is what eager mode computes: values bit for bit, gradients within 1e-6."""

import itertools
import re

import pytest
import torch
from kernel_case import assert_near, values
from torch._inductor.utils import run_and_get_code

import qframework
import qframework.kernels  # adds the forms for graphs
from qframework.functional import (
    IntegerGrid,
    MinifloatFormat,
    ScaleRule,
    apply_step,
    codebook_quantize,
    fake_quantize,
    is_recomputing,
    learned_scale,
    minifloat_quantize,
    quantize_by_absmax,
    repeat_while,
    tensor_clamp_ste,
)

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
    # A sum of numbers of both signs may come out near 0: relative to the size that it has by chance.
    size = upstream.double().norm().item()
    found, expected = (
        [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        for tensors in (leaves, wide)
    )
    assert_near(found, expected, 1e-6, size)
    return "".join(code)


def combined(*axes: list, each_time: set[tuple]) -> list:
    """All combinations; those that aren't compiled each time are exhaustive."""
    return [
        pytest.param(*case, marks=() if case in each_time else pytest.mark.exhaustive)
        for case in itertools.product(*axes)
    ]


IMAGES, SEQUENCES, ROWS = (4, 16, 9, 11), (6, 33, 40), (64, 50)
UNSIGNED, SIGNED = (0.0, 15.0), (-7.0, 7.0)


@pytest.mark.parametrize(
    ("shape", "bounds", "relu"),
    combined(
        [IMAGES, SEQUENCES, ROWS],
        [UNSIGNED, SIGNED],
        [False, True],
        each_time={
            (IMAGES, UNSIGNED, True),
            (IMAGES, SIGNED, False),
            (SEQUENCES, SIGNED, True),
            (ROWS, UNSIGNED, False),
        },
    ),
)
def test_a_range(shape, bounds, relu) -> None:
    rule, grid = ScaleRule("learned", 15.0, minimum=0.01), IntegerGrid(*bounds)

    def traced(x, stored):
        return fake_quantize(x, learned_scale(stored, rule), None, grid, relu)

    def composed(x, stored):
        scale = stored.abs().clamp_min(0.01) / 15
        return fake_quantize(torch.relu(x) if relu else x, scale, None, grid)

    compare(traced, composed, values(*shape), torch.tensor(3.75))


@pytest.mark.parametrize("clamp_gradient", [True, False])
def test_a_range_with_a_zero_point_and_scales_of_channels(clamp_gradient) -> None:
    grid = IntegerGrid(0.0, 15.0, "round", clamp_gradient)

    def quantize(x, scale, zero):
        return fake_quantize(x, scale, zero, grid)

    scale = torch.tensor([0.25, 0.5, 0.125]).reshape(1, 3, 1, 1)
    compare(quantize, quantize, values(4, 3, 8, 8), torch.tensor(0.25), torch.tensor(6.0))
    compare(quantize, quantize, values(4, 3, 8, 8), scale, scale * 16)


def test_bounds_that_are_learned() -> None:
    def quantize(x, scale, low, high):
        return fake_quantize(x, scale, None, IntegerGrid(low, high))

    numbers = (torch.tensor(0.25), torch.tensor(-5.0), torch.tensor(6.0))
    compare(quantize, quantize, values(4, 3, 8, 8), *numbers)


@pytest.mark.parametrize(
    ("per_channel", "shape", "domain"),
    combined(
        [False, True],
        [(8, 6, 3, 3), (24, 32)],
        ["fp", "power_of_two"],
        each_time={
            (False, (24, 32), "fp"),
            (True, (8, 6, 3, 3), "fp"),
            (False, (8, 6, 3, 3), "power_of_two"),
            (True, (24, 32), "power_of_two"),
        },
    ),
)
def test_a_weight(per_channel, shape, domain) -> None:
    x = values(*shape)
    x.view(-1)[[5, 77]] = x.abs().max() + 1  # shared by two, in one channel or in two
    scale_shape = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    axis = 0 if per_channel else None
    rule = ScaleRule("absmax", 8.0, domain, "ceil", 0.01, scale_shape, axis)

    def quantize(x):
        return quantize_by_absmax(x, IntegerGrid(-7.0, 7.0, "round", False), rule)[0]

    compare(quantize, quantize, x)


def test_the_scale_of_a_weight_has_its_gradient_too() -> None:
    rule = ScaleRule("absmax", 8.0, shape=(24, 1), channel_axis=0)
    grid = IntegerGrid(-7.0, 7.0, "round", False)

    def quantize(x):
        y, scale = quantize_by_absmax(x, grid, rule)
        return y + scale * scale

    compare(quantize, quantize, values(24, 32))


def test_other_formats() -> None:
    fmt = MinifloatFormat(3, 7, 448.0)
    entries = torch.tensor([-9.0, -4.5, -1.25, 0.0, 0.75, 3.0, 7.0])

    def minifloat(x, scale):
        return minifloat_quantize(x, scale, fmt)

    compare(minifloat, minifloat, values(6, 50), torch.tensor(0.25))
    compare(codebook_quantize, codebook_quantize, values(6, 50), torch.tensor(0.25), entries)


def test_straight_through_functions() -> None:
    def by_numbers(x):
        return tensor_clamp_ste(apply_step(x, "round") + apply_step(x, "ternary_sign"), -2.0, 3.0)

    def by_tensors(x, low):
        return tensor_clamp_ste(apply_step(x, "floor"), low.detach(), -low.detach()) + low

    compare(by_numbers, by_numbers, values(6, 50))
    compare(by_tensors, by_tensors, values(6, 50), torch.tensor(-2.0))


def test_the_scale_is_computed_once_and_no_boolean_tensor_is_kept() -> None:
    rule, grid = ScaleRule("learned", 255.0), IntegerGrid(0.0, 255.0)

    def traced(x, stored):
        x = x * 1.5 + 0.5  # such as a norm
        return fake_quantize(x, learned_scale(stored, rule), None, grid, relu=True)

    def composed(x, stored):
        return fake_quantize(torch.relu(x * 1.5 + 0.5), stored.abs() / 255, None, grid)

    code = compare(traced, composed, values(4, 16, 8, 8), torch.tensor(31.875))
    assert not re.search(r"bool\*", code)
    loops = [part for part in code.split("for(int64_t")[1:] if "round()" in part]
    assert loops
    for loop in loops:  # the division of a scale by its threshold is outside
        assert "std::abs" not in loop.split("store(")[0]


# ------------------------------------------------------------ what definitions ask


@pytest.mark.parametrize("limit", [3, 100])
def test_a_loop_in_a_graph_ends_as_one_without_does(limit) -> None:
    def halve(x, count):
        return repeat_while(
            lambda x, count: (x > 1).any(),
            lambda x, count: (torch.where(x > 1, x / 2, x), count + (x > 1)),
            (x, count),
            limit,
        )

    start = torch.tensor([40.0, 0.5, 7.0]), torch.zeros(3)
    compiled = torch.compile(halve, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*start), halve(*start), strict=True):
        assert torch.equal(one, other)


def test_no_graph_counts_the_pass_that_recomputes() -> None:
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(is_recomputing())
            return grad

    Ask.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [True] and not is_recomputing()
    compiled = torch.compile(lambda x: x + is_recomputing(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [1.0, 1.0]
