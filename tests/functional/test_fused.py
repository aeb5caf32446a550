"""Every fused function equals the composed one: values bit for bit, gradients within 1e-6 of a composed float64 reference."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qframework.functional.fixed_range import _first_outside
from qframework.functional.native import tensors

import qframework
from qframework.functional import (
    LargestScaled,
    LearnedScaled,
    abs_max,
    fake_quantize,
    native,
    order_statistic,
    quantize_by_largest,
    quantize_by_stored,
    statistic_scale,
    stored_scale,
)

KERNELS = {"now": "fused"}


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels(request, monkeypatch) -> None:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setitem(KERNELS, "now", request.param)
    monkeypatch.setattr(tensors, "SMALLEST", 1)


LARGE = (9, 37, 1021)  # taken in slices on a CPU, with a ragged end


def both(function, *tensors: torch.Tensor) -> tuple[list, list]:
    """Results and gradients of the fused function, and of the composed one in float64 (values in the same dtype)."""
    found = []
    for kernels in (KERNELS["now"], "reference"):
        with qframework.settings.use(kernels=kernels):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            values = [t.detach() for t in out]
            wide = kernels == "reference"
            if wide:
                leaves = [t.double().clone().requires_grad_() for t in tensors]
                out = function(*leaves)
                out = out if isinstance(out, tuple) else (out,)
            generator = torch.Generator().manual_seed(3)
            upstream = [torch.randn(t.shape, generator=generator) for t in out]
            loss = sum((t * u.to(t.dtype)).sum() for t, u in zip(out, upstream, strict=True))
            size = upstream[0].double().norm().item()
            found.append((values, torch.autograd.grad(loss, leaves, materialize_grads=True), size))
    return found[0], found[1]


def check(function, *tensors: torch.Tensor, tolerance: float = 1e-6) -> None:
    (values, grads, size), (expected, wide, _) = both(function, *tensors)
    for a, b in zip(values, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads, wide, strict=True):
        # A sum of numbers of both signs may come out near 0: relative to the size that it has by chance.
        assert (a.double() - b).norm() <= tolerance * max(b.norm().item(), size)


def values(shape: tuple[int, ...] = LARGE, step: float = 1 / 64) -> torch.Tensor:
    """Numbers whose quotients by a power of two are exact, so that float32 and float64 round alike."""
    generator = torch.Generator().manual_seed(1)
    return torch.round(torch.randn(shape, generator=generator) * 2 / step) * step


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (0.0, 15.0), (0.0, 14.0), (-7.0, 7.0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_fixed_range(bounds, masked, rectify, shape) -> None:
    def composed(x, scale):
        if qframework.settings.kernels == "reference" and rectify:
            return fake_quantize(torch.relu(x), scale, None, *bounds, "round", masked)
        return fake_quantize(x, scale, None, *bounds, "round", masked, rectify)

    check(composed, values(shape), torch.tensor(0.25))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_a_fixed_range_with_a_zero_point(masked, shape) -> None:
    check(
        lambda x, scale, zero: fake_quantize(x, scale, zero, 0.0, 15.0, "round", masked),
        values(shape),
        torch.tensor(0.25),
        torch.tensor(6.0),
        tolerance=2e-6,  # the summands are integers up to 9
    )


def test_channels_last_gives_the_same() -> None:
    x = values((8, 16, 64, 64))
    grads = []
    for format in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=format).requires_grad_()
        scale = torch.tensor(0.25, requires_grad=True)
        y = fake_quantize(leaf, scale, None, 0.0, 15.0, rectify=True)
        grads.append(torch.autograd.grad((y * y.detach().sin()).sum(), (leaf, scale)))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("domain", "rounding", "minimum"),
    [*itertools.product(["fp", "log_fp"], ["round"], [None, 0.3]), ("power_of_two", "ceil", 0.3)],
)
def test_scales(domain, rounding, minimum) -> None:
    threshold = torch.tensor(8.0)

    def composed(function, of_statistic):
        def apply(v):
            if qframework.settings.kernels != "reference":
                return function(v, threshold.to(v.dtype), domain, rounding, minimum)
            from qframework.core.function_wrapper import CeilSte, RoundSte
            from qframework.core.restrict_val import (
                FloatRestrictValue,
                LogFloatRestrictValue,
                PowerOfTwoRestrictValue,
                ScaleRestriction,
            )

            step = CeilSte() if rounding == "ceil" else RoundSte()
            kind = {
                "fp": FloatRestrictValue(),
                "log_fp": LogFloatRestrictValue(),
                "power_of_two": PowerOfTwoRestrictValue(step),
            }[domain]
            restriction = ScaleRestriction(kind, FloatRestrictValue(), None, minimum)
            stored = restriction.to_domain(v) if of_statistic else v
            return restriction(stored, threshold.to(v.dtype))

        return apply

    positive = torch.tensor([0.2, 0.9, 3.7, 11.0])
    check(composed(statistic_scale, True), positive)
    signed = torch.tensor([-1.5, 0.0, 0.7, 2.6])
    check(composed(stored_scale, False), signed)


@pytest.mark.parametrize("shape", [(6, 5), (64, 5003)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("domain", ["fp", "power_of_two"])
def test_weights_by_their_largest_magnitude(shape, per_channel, domain) -> None:
    how = LargestScaled(
        -128.0,
        127.0,
        "round",
        domain,
        "round",
        1e-10,
        (shape[0], 1) if per_channel else (),
        None,
        per_channel,
    )
    x = values(shape, 1 / 1024)
    x.view(-1)[3] = 16.0  # per tensor the scale is a power of two: float32 and float64 round alike
    if per_channel:
        x[:, 2] = 16.0
    x = x.clamp(-16, 16)

    def composed(x):
        threshold = torch.tensor(128.0, dtype=x.dtype)
        if qframework.settings.kernels != "reference":
            return quantize_by_largest(x, threshold, how)
        top = x.abs().max(1).values.reshape(-1, 1) if per_channel else x.abs().max()
        scale = top / threshold
        if domain == "power_of_two":
            from qframework.functional import round_ste

            scale = torch.exp2(round_ste(torch.log2(top))) / threshold
        return fake_quantize(x, scale, None, -128.0, 127.0, "round", False), scale

    check(composed, x)


@pytest.mark.parametrize("order", [None, (1, 0, 2)])
def test_channels_may_come_second(order) -> None:
    how = LargestScaled(-7.0, 7.0, "round", "fp", "round", None, (1, 4, 1), (1, 0, 2), True)
    x = torch.randn(3, 4, 5, requires_grad=True)
    y, scale = quantize_by_largest(x, torch.tensor(7.0), how)
    rows = x.detach().permute(1, 0, 2).reshape(4, -1)
    torch.testing.assert_close(scale, (rows.abs().amax(1) / 7).reshape(1, 4, 1))
    (grad,) = torch.autograd.grad(scale.sum(), x, retain_graph=True)
    assert grad.count_nonzero() == 4
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), LARGE])
def test_learned_scales(shape, rectify) -> None:
    how = LearnedScaled(0.0, 15.0, "round", True, "fp", "round", 1e-10)

    def composed(x, stored):
        threshold = torch.tensor(16.0, dtype=x.dtype)
        if qframework.settings.kernels != "reference":
            return quantize_by_stored(x, stored, threshold, how, rectify)
        scale = stored.abs() / threshold
        x = torch.relu(x) if rectify else x
        return fake_quantize(x, scale, None, 0.0, 15.0), scale

    check(composed, values(shape), torch.tensor(4.0))


@given(
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_order_statistics_are_exact(rank, largest, magnitude, seed, ties) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200_003, generator=generator)
    x = (x * 4).round() if ties else x
    leaf = x.clone().requires_grad_()
    found = order_statistic(leaf, rank, largest, magnitude)
    ordered = (x.abs() if magnitude else x).sort(descending=largest).values
    assert found.item() == ordered[rank - 1].item()
    (grad,) = torch.autograd.grad(found, leaf)
    (where,) = grad.nonzero(as_tuple=True)
    if magnitude and not found.item():
        assert not len(where)  # the slope of |x| at 0
        return
    assert len(where) == 1
    assert (x.abs() if magnitude else x)[where] == found
    assert grad[where].item() == (x[where].sign().item() if magnitude else 1.0)


def test_the_largest_magnitude_shares_its_gradient() -> None:
    x = torch.tensor([1.0, -3.0, 2.0, 3.0], requires_grad=True)
    (grad,) = torch.autograd.grad(abs_max(x), x)
    assert grad.tolist() == [0.0, -0.5, 0.0, 0.5]
    zero = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(abs_max(zero), zero)[0].tolist() == [0.0, 0.0, 0.0]


def test_one_tensor_is_kept_for_an_activation_and_none_for_a_weight() -> None:
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    weight = torch.nn.Parameter(torch.randn(64, 64))
    how = LargestScaled(-127.0, 127.0, "round", "fp", "round", None, (), None, False)
    x = torch.randn(64, 64, requires_grad=True) * 1.0
    stored = torch.tensor(2.0, requires_grad=True)
    learned = LearnedScaled(0.0, 255.0, "round", True, "fp", "round", None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        quantize_by_largest(weight, torch.tensor(127.0), how)
        assert kept == []
        quantize_by_stored(x, stored, torch.tensor(255.0), learned, True)
    assert sorted(kept) == [1, 1, 4096]


@pytest.mark.slow
def test_inductor_gives_the_same(monkeypatch) -> None:
    monkeypatch.setattr(native, "serves", lambda *operands, **gradients: None)
    how = LearnedScaled(0.0, 15.0, "round", True, "fp", "round", None)
    weight = LargestScaled(-7.0, 7.0, "round", "fp", "round", None, (), None, False)
    rows = LargestScaled(-7.0, 7.0, "round", "fp", "round", None, (64, 1), None, True)
    x, w = torch.randn(64, 501), torch.randn(64, 257)
    results = {}
    for kernels in ("fused", "compiled"):
        with qframework.settings.use(kernels=kernels):
            leaves = [t.clone().requires_grad_() for t in (x, w, torch.tensor(3.0))]
            y, _ = quantize_by_stored(leaves[0], leaves[2], torch.tensor(15.0), how, True)
            a, _ = quantize_by_largest(leaves[1], torch.tensor(7.0), weight)
            b, _ = quantize_by_largest(leaves[1], torch.tensor(7.0), rows)
            loss = (y * y.detach().sin()).sum() + (a * b.detach()).sum() + (b * a.detach()).sum()
            results[kernels] = [y, a, b], torch.autograd.grad(loss, leaves)
    for one, other in zip(results["fused"][0], results["compiled"][0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(results["fused"][1], results["compiled"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**24 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_the_bound_of_a_mask_is_the_first_number_that_rounds_beyond_the_range(
    maximum, dtype
) -> None:
    bound = torch.tensor(_first_outside(float(maximum), dtype), dtype=torch.float64)
    assert bound == bound.to(dtype)
    before = torch.nextafter(bound.to(dtype), torch.tensor(0.0, dtype=dtype))
    assert bound.to(dtype).round() > maximum >= before.round()
