"""Weights are made again in the backward pass, part by part; gradients are those of layers that keep them, whoever looks on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qframework
from qframework import quantizers as q
from qframework.functional import IntegerGrid, ScaleRule, linear, quantize_by_absmax
from qframework.kernels import autograd, products, recomputation
from qframework.kernels.native import tensors
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear

WEIGHTS = [
    q.Int8WeightPerTensorFloat,
    q.Int8WeightPerChannelFloat,
    q.Int8WeightPerChannelFixedPoint,
    q.Int8WeightPerGroupFloat,
    q.ShiftedUint8WeightPerTensorFloat,
    q.ShiftedUint8WeightPerChannelFloat,
    q.Fp8e4m3OCPWeight,
    q.Fp8e4m3OCPWeightPerTensorFloat,
    q.Fp8e4m3OCPWeightPerChannelFloat,
    q.MXFloat8e4m3Weight,
    q.MXInt8Weight,
    q.NVFloat4Weight,
    q.SignedTernaryWeightPerTensorConst,
]


@pytest.fixture(autouse=True)
def in_parts(monkeypatch) -> None:
    """Whatever the size, in several parts."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    monkeypatch.setattr(recomputation, "LARGE", 1)
    monkeypatch.setattr(recomputation, "LARGE_KERNELS", 1)
    monkeypatch.setattr(autograd, "_WORTH", 1)
    monkeypatch.setattr(products, "_AT_ONCE", 1400)  # the last part is shorter
    with qframework.settings.use(kernels="auto", recompute="auto"):
        yield


def results(layer: nn.Module, x: torch.Tensor, recompute: str) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    with qframework.settings.use(recompute=recompute):
        y = layer(leaves[0])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def layer_of(weight: type, **how: object) -> QuantLinear:
    torch.manual_seed(0)
    if weight is q.SignedTernaryWeightPerTensorConst:
        how["weight_scaling_init"] = 0.1
    return QuantLinear(70, 24, weight_quant=weight, **how)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("shape", [(5, 70), (3, 40, 70)])
def test_linear_layers_have_the_gradients_of_those_that_keep_their_weight(weight, shape) -> None:
    layer, x = layer_of(weight), torch.randn(shape)
    kept, made = results(layer, x, "never"), results(layer, x, "auto")
    assert torch.equal(kept[0], made[0])
    for a, b in zip(kept[1:], made[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [q.Int8WeightPerChannelFloat, q.MXFloat8e4m3Weight])
def test_convolutions_have_the_gradients_of_those_that_keep_their_weight(weight) -> None:
    torch.manual_seed(0)
    layer, x = QuantConv2d(32, 8, 3, groups=1, weight_quant=weight), torch.randn(2, 32, 7, 7)
    for a, b in zip(results(layer, x, "never"), results(layer, x, "auto"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS[:12], ids=lambda w: w.__name__)
def test_no_second_copy_of_a_weight_is_kept(weight) -> None:
    torch.manual_seed(0)
    layer, x = QuantLinear(64, 64, weight_quant=weight), torch.randn(4, 64).requires_grad_()
    own, kept = layer.weight.untyped_storage().data_ptr(), {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    kept.pop(own, None)
    groups = 4 * 64 * 64 // 16  # a scale for each
    assert (
        sum(kept.values()) <= 4 * 64 * 4 + (8 if weight is q.NVFloat4Weight else 1) * groups + 1024
    )


# ------------------------------------------------------------ whoever looks on


def quantized_weight() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    w = torch.randn(24, 64, requires_grad=True)
    rule = ScaleRule("absmax", 127.0, shape=(24, 1), channel_axis=0)
    return w, quantize_by_absmax(w, IntegerGrid(-127.0, 127.0, "round", False), rule)[0]


def expected(x: torch.Tensor, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the quantized weight and of the weight, by torch's own product."""
    w, y = quantized_weight()
    return torch.autograd.grad(times * F.linear(x, y).square().sum(), [y, w])


@pytest.mark.parametrize(
    "keeps", [lambda g: g, lambda g: g.detach(), lambda g: g.view(-1), lambda g: g[3:]]
)
def test_a_gradient_that_a_hook_keeps_is_not_overwritten(keeps) -> None:
    x = torch.randn(5, 64)
    w, y = quantized_weight()
    seen: list[torch.Tensor] = []

    def hook(g: torch.Tensor) -> None:
        seen.append(keeps(g))

    y.register_hook(hook)
    linear(x, y).square().sum().backward()
    of_y, of_w = expected(x)
    torch.testing.assert_close(seen[0], keeps(of_y))
    torch.testing.assert_close(w.grad, of_w)


def test_a_gradient_that_a_hook_replaces_counts() -> None:
    x = torch.randn(5, 64)
    w, y = quantized_weight()
    y.register_hook(lambda g: 2 * g)
    linear(x, y).square().sum().backward()
    torch.testing.assert_close(w.grad, expected(x, 2)[1])


def test_a_gradient_that_a_hook_writes_to_counts() -> None:
    x = torch.randn(5, 64)
    w, y = quantized_weight()
    y.register_hook(lambda g: g.mul_(2))
    linear(x, y).square().sum().backward()
    torch.testing.assert_close(w.grad, expected(x, 2)[1])


@pytest.mark.parametrize("late", (True, False))
@pytest.mark.parametrize("writes", [lambda g: g.data.mul_(2), lambda g: g.numpy().__imul__(2)])
def test_a_gradient_that_a_hook_writes_to_behind_torch_s_back_counts(writes, late) -> None:
    x = torch.randn(5, 64)
    w, y = quantized_weight()

    def hook(g: torch.Tensor) -> None:
        writes(g)

    if not late:
        y.register_hook(hook)
    loss = linear(x, y).square().sum()
    if late:
        y.register_hook(hook)
    else:
        del y
    loss.backward()
    torch.testing.assert_close(w.grad, expected(x, 2)[1])


@pytest.mark.parametrize("shape", [(0, 70), (0, 3, 70), (3, 0, 70)])
def test_a_batch_of_no_samples_has_gradients_of_zeros(shape) -> None:
    layer, x = layer_of(q.Int8WeightPerChannelFloat), torch.zeros(shape)
    y, of_x, *others = results(layer, x, "auto")
    assert y.shape == (*shape[:-1], 24) and of_x.shape == shape
    assert all(bool((g == 0).all()) for g in others)


def test_several_gradients_at_once_are_each_that_of_its_own() -> None:
    layer, x = layer_of(q.Int8WeightPerChannelFloat), torch.randn(5, 70, requires_grad=True)
    y, leaves = layer(x), [x, layer.weight]
    upstream = torch.randn(3, *y.shape)
    at_once = torch.autograd.grad(y, leaves, upstream, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in upstream]
    for found, each in zip(at_once, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each))


def test_a_retained_gradient_is_that_of_the_quantized_weight() -> None:
    x = torch.randn(5, 64)
    _, y = quantized_weight()
    y.retain_grad()
    linear(x, y).square().sum().backward()
    torch.testing.assert_close(y.grad, expected(x)[0])


def test_a_weight_in_two_products_and_a_penalty_gets_the_sum() -> None:
    x, z = torch.randn(5, 64), torch.randn(3, 64)
    found = []
    for product in (linear, F.linear):
        w, y = quantized_weight()
        (product(x, y).square().sum() + product(z, y).sin().sum() + y.square().sum()).backward()
        found.append(w.grad)
    torch.testing.assert_close(*found)


def test_gradients_accumulate_over_two_passes() -> None:
    x = torch.randn(5, 64)
    w, y = quantized_weight()
    linear(x, y).square().sum().backward(retain_graph=True)
    linear(x, y).square().sum().backward()
    torch.testing.assert_close(w.grad, expected(x, 2)[1])


def test_the_gradient_of_a_graph_is_that_of_the_definition() -> None:
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in ("auto", "never"):
        layer = QuantLinear(64, 24, weight_quant=q.Int8WeightPerChannelFloat, dtype=torch.float64)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(layer.bias)
        with qframework.settings.use(recompute=recompute):
            y = layer(x).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------ whoever writes to quantized values


def halve(_module: object, _args: object, out: object) -> None:
    value = out if isinstance(out, torch.Tensor) else out.value
    value.data.mul_(0.5)


class HalvedWeight(QuantLinear):
    """A user's own."""

    def quant_weight(self, quant_input: object = None) -> object:
        quantized = super().quant_weight(quant_input)
        halve(self, (), quantized)
        return quantized


class HalvedResult(QuantIdentity):
    """A user's own."""

    def forward(self, input: object) -> object:
        out = super().forward(input)
        halve(self, (), out)
        return out


def with_hook(name: str) -> QuantLinear:
    layer = QuantLinear(70, 24, weight_quant=q.Int8WeightPerChannelFloat, input_quant=ACT)
    layer.get_submodule(name).register_forward_hook(halve)
    return layer


def with_forward(name: str) -> QuantLinear:
    layer = QuantLinear(70, 24, weight_quant=q.Int8WeightPerChannelFloat, input_quant=ACT)
    proxy = layer.get_submodule(name)
    before = proxy.forward

    def forward(*args: object) -> object:
        out = before(*args)
        halve(proxy, args, out)
        return out

    proxy.forward = forward
    return layer


class HalvedInput(QuantLinear):
    """A user's own."""

    def forward(self, input: object) -> object:
        halve(self, (), input)
        return super().forward(input)


def before(linear: nn.Module) -> nn.Module:
    return nn.Sequential(QuantIdentity(), linear)


def hooked_before() -> nn.Module:
    layer = QuantLinear(70, 24)
    layer.register_forward_pre_hook(lambda module, args: halve(module, (), args[0]))
    return before(layer)


def behind(act: nn.Module) -> nn.Module:
    return nn.Sequential(act, QuantLinear(70, 24))


def hooked(act: nn.Module, name: str) -> nn.Module:
    act.get_submodule(name).register_forward_hook(halve)
    return behind(act)


ACT = q.Int8ActPerTensorFloat
WRITERS = {
    "a hook on the weight's quantizer": lambda: with_hook("weight_quant"),
    "a hook on the input's quantizer": lambda: with_hook("input_quant"),
    "a forward of the weight's quantizer": lambda: with_forward("weight_quant"),
    "a forward of the input's quantizer": lambda: with_forward("input_quant"),
    "a quant_weight": lambda: HalvedWeight(70, 24, weight_quant=q.Int8WeightPerChannelFloat),
    "a hook on an activation": lambda: hooked(QuantIdentity(), ""),
    "a hook on an activation's quantizer": lambda: hooked(QuantIdentity(), "act_quant"),
    "an activation's forward": lambda: behind(HalvedResult()),
    "a hook in front of a layer": hooked_before,
    "a layer's forward": lambda: before(HalvedInput(70, 24)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_user_writes_to_quantized_values_counts_in_gradients(writer) -> None:
    torch.manual_seed(0)
    layer, x = WRITERS[writer](), torch.randn(5, 70)
    with torch.no_grad():
        layer(x)  # statistics are collected
    for module in layer.modules():
        if hasattr(module, "finish_collection"):
            module.finish_collection()
    kept, made = results(layer, x, "never"), results(layer, x, "auto")
    for a, b in zip(kept, made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


GROUPED = [q.MXFloat8e4m3Weight, q.Fp8e4m3OCPWeightPerTensorFloat, q.Int8WeightPerGroupFloat]


@pytest.mark.parametrize("quantizer", GROUPED)
@pytest.mark.parametrize(
    "keeps", [lambda g: g, lambda g: g.detach(), lambda g: g.view(-1), lambda g: g[3:]]
)
def test_a_gradient_of_groups_that_a_hook_keeps_is_not_overwritten(quantizer, keeps) -> None:
    layer = QuantLinear(64, 24, bias=False, weight_quant=quantizer)
    seen: list[torch.Tensor] = []
    y = layer.quant_weight().value
    y.register_hook(lambda g: seen.extend((keeps(g), keeps(g).clone())))
    linear(torch.randn(5, 64), y).square().sum().backward()
    assert torch.equal(*seen)


@pytest.mark.parametrize("quantizer", GROUPED)
def test_a_gradient_that_nobody_keeps_becomes_that_of_the_weight(quantizer) -> None:
    layer = QuantLinear(64, 24, bias=False, weight_quant=quantizer)
    places: list[int] = []
    y = layer.quant_weight().value
    y.register_hook(lambda g: places.append(g.data_ptr()))
    linear(torch.randn(5, 64), y).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.data_ptr() == places[0]


@pytest.mark.parametrize("learnt", ["before", "after"])
def test_holders_are_told_apart_where_a_compiler_stands_in_front_of_calls(learnt) -> None:
    autograd._alone.cache_clear()
    if learnt == "before":
        test_a_gradient_that_nobody_keeps_becomes_that_of_the_weight(q.MXFloat8e4m3Weight)

    def refused(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it can't be compiled")

    with pytest.raises(Exception, match="can't be compiled"):  # from here on calls hold more
        torch.compile(refused, backend="eager", fullgraph=True)(torch.ones(()))
    test_a_gradient_that_nobody_keeps_becomes_that_of_the_weight(q.MXFloat8e4m3Weight)
    for copies in range(4):
        layer = QuantLinear(64, 24, bias=False, weight_quant=q.MXFloat8e4m3Weight)
        y, seen, as_it_was = layer.quant_weight().value, list[torch.Tensor](), list[torch.Tensor]()

        def hook(g: torch.Tensor, n: int = copies, seen: list[torch.Tensor] = seen) -> None:
            seen.extend([g] * n)

        y.register_hook(lambda g, kept=as_it_was: kept.append(g.clone()))
        y.register_hook(hook)
        linear(torch.randn(5, 64), y).square().sum().backward()
        assert all(torch.equal(g, as_it_was[0]) for g in seen)
