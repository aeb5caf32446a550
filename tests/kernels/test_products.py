"""Layers keep what their input was quantized from; gradients are those of layers that keep the input itself."""

import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import qframework
from qframework.functional import (
    IntegerGrid,
    convolution,
    fake_quantize,
    linear,
    transposed_convolution,
)
from qframework.kernels.native import tensors
from qframework.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose2d,
    QuantIdentity,
    QuantLinear,
    QuantReLU,
)
from qframework.quantizers import Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Whatever the size, where there is a compiler or not."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels="auto", recompute="always"):
        yield


def gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    out = function(*leaves)
    out = out if isinstance(out, torch.Tensor) else out.value
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=generator)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def both(function, *leaves: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    made_anew = gradients(function, *leaves)
    with qframework.settings.use(recompute="never"):
        return made_anew, gradients(function, *leaves)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


PRODUCTS = {
    "linear": (lambda x, w, b: linear(x, w, b), (5, 8), (4, 8)),
    "linear of sequences": (lambda x, w, b: linear(x, w, b), (3, 5, 8), (4, 8)),
    "conv1d": (lambda x, w, b: convolution(x, w, b, 2, 1), (2, 6, 9), (4, 6, 3)),
    "conv2d": (lambda x, w, b: convolution(x, w, b, (1, 2), 1, 2, 2), (2, 6, 9, 8), (4, 3, 3, 3)),
    "conv3d": (lambda x, w, b: convolution(x, w, b), (2, 3, 4, 5, 4), (4, 3, 2, 2, 2)),
    "transposed": (
        lambda x, w, b: transposed_convolution(x, w, b, 2, 1, (1, 0), 2),
        (2, 6, 5, 4),
        (6, 2, 3, 3),
    ),
    "same padding": (lambda x, w, b: convolution(x, w, b, 1, "same"), (2, 3, 6), (4, 3, 3)),
    "one image": (lambda x, w, b: convolution(x, w, b), (3, 6, 6), (4, 3, 3, 3)),
}


@pytest.mark.parametrize("kernels", ["auto", "fused"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_have_the_gradients_of_torch(kind, bias, relu, kernels) -> None:
    torch.manual_seed(0)
    product, x_shape, w_shape = PRODUCTS[kind]

    def function(x, scale, w, *b):
        y = fake_quantize(x, scale, None, IntegerGrid(0.0, 15.0), relu)
        return product(y, w * 1.0, b[0] if b else None)

    leaves = [leaf(*x_shape), torch.tensor(0.2, requires_grad=True), leaf(*w_shape)]
    leaves += [leaf(4)] if bias else []
    with qframework.settings.use(kernels=kernels):
        for a, b in zip(*both(function, *leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


LAYERS = {
    "linear": lambda: (QuantLinear(8, 4), (5, 8)),
    "conv1d": lambda: (QuantConv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv2d": lambda: (QuantConv2d(6, 4, 3, groups=2, padding_mode="reflect", padding=1), (2, 6, 9, 9)),
    "conv3d": lambda: (QuantConv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "transposed": lambda: (QuantConvTranspose2d(6, 4, 3, stride=2), (2, 6, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("act", [Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_have_the_gradients_of_torch(kind, act, quantized) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    layer.return_quant_tensor = quantized and act is Int8ActPerTensorFloat
    quant = QuantIdentity(act_quant=act, return_quant_tensor=quantized, collect_stats_steps=2)
    parameters = [*layer.parameters(), *quant.parameters()]

    def function(x, *_):
        return layer(quant(x))

    for _ in range(4):
        x = leaf(*shape)
        for module in (layer, quant):
            module.train()
        function(x)
    for a, b in zip(*both(function, x, *parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantConv2d(3, 8, 3, padding=1),
        QuantReLU(collect_stats_steps=1),
        QuantConv2d(8, 8, 3, padding=1),
        QuantReLU(collect_stats_steps=1),
        nn.Flatten(),
        QuantLinear(8 * 36, 4),
    )
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6))
    return model


def bytes_kept(model: nn.Module, x: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    out.sum().backward()
    return sum(kept.values())


def test_quantized_operands_are_not_kept() -> None:
    model, x = network(), torch.randn(64, 3, 6, 6)
    operands = 64 * 8 * 36 * 4 + sum(4 * p.numel() for p in model.parameters() if p.dim() > 1)
    saved = bytes_kept(model, x)
    with qframework.settings.use(recompute="never"):
        more = bytes_kept(model, x) - saved
    assert operands - 64 <= more <= operands  # the other activation goes through a flatten

    watch = Watch()
    out = nn.Sequential(*model[:2], watch, *model[2:])(x)
    assert watch.seen() is None
    out.sum().backward()


class Watch(nn.Module):
    """Keeps track of what passes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = weakref.ref(x)
        return x


def recomputes(y: torch.Tensor) -> bool:
    """Whether a product of ``y`` saves what it was made of."""
    weight = leaf(1, y.shape[-1])
    kernels = [kernel for kernel in linear.kernels if kernel.serves(y, weight, None)]
    return any(kernel.run(y, weight, None) is not NotImplemented for kernel in kernels)


def test_what_quantized_values_were_made_of_goes_with_them() -> None:
    x = leaf(3, 4) * 1.0
    made_of, y = weakref.ref(x), quantized(x)
    del x
    assert recomputes(y) and made_of() is not None
    total = (y * y).sum()
    del y
    total.backward()
    del total
    gc.collect()
    assert made_of() is None


def test_what_quantized_values_were_made_of_goes_once_it_was_differentiated() -> None:
    x = leaf(3, 4) * 1.0
    made_of, y = weakref.ref(x), quantized(x)
    del x
    y.sum().backward()
    gc.collect()
    assert made_of() is None


def quantized(x: torch.Tensor) -> torch.Tensor:
    return fake_quantize(x, torch.tensor(0.2), None, IntegerGrid(-8.0, 7.0))


def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = quantized(x)
    with torch.no_grad():
        y.mul_(2)
    return linear(y, w * 1)


def other_data(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = quantized(x)
    y.data = y.data * 3
    return linear(y, w * 1)


def other_memory_there(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = quantized(x)
    held = y.detach().numpy()
    y.data = torch.from_numpy(held)  # as memory that was freed may be had again
    held *= 3
    return linear(y, w * 1)


@pytest.mark.parametrize("change", [in_place, other_data, other_memory_there])
def test_quantized_values_that_are_written_to_are_used_as_they_are(change) -> None:
    for a, b in zip(*both(change, leaf(5, 8), leaf(4, 8)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_copies_elsewhere_are_values_alone() -> None:
    y = quantized(leaf(5, 8) * 1)
    with io.BytesIO() as file:
        torch.save(y, file)
        file.seek(0)
        copied = torch.load(file)
    assert "origin" in vars(y) and not vars(copied).get("origin")
    w = leaf(4, 8)
    linear(copied.requires_grad_() * 1, w * 1).sum().backward()
    torch.testing.assert_close(w.grad[0], y.detach().sum(0))


def test_quantized_values_may_be_written_to_afterwards() -> None:
    def function(x, w, change=True):
        y = quantized(x)
        out = linear(y, w * 1)
        if change:
            with torch.no_grad():
                y.zero_()
        return out

    x, w = leaf(5, 8), leaf(4, 8)
    changed = gradients(function, x, w)
    for a, b in zip(changed, gradients(lambda x, w: function(x, w, False), x, w), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("early", [False, True])
def test_an_input_of_a_quantizer_that_is_written_to_is_an_error(early) -> None:
    x, w = leaf(5, 8), leaf(4, 8)
    before = x * 1
    y = quantized(before)
    if early:
        before.data_ptr(), before.add_(1)
    out = linear(y, w * 1)
    if not early:
        before.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_graphs_that_are_kept_run_again_and_are_differentiated_twice() -> None:
    x, w = leaf(5, 8), leaf(4, 8)
    out = linear(quantized(x), w * 1).sin().sum()
    first = torch.autograd.grad(out, (x, w), retain_graph=True)
    second = torch.autograd.grad(out, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def twice(x, w):
        out = linear(quantized(x), w).sin().sum()
        slopes = torch.autograd.grad(out, (x, w), create_graph=True)
        return torch.cat([s.flatten() for s in slopes])

    for a, b in zip(*both(twice, x, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.any()


def test_gradients_of_the_quantized_values_can_be_looked_at() -> None:
    y = quantized(leaf(5, 8))
    y.retain_grad()
    seen = []
    y.register_hook(lambda g: seen.append(g))
    linear(y, leaf(4, 8) * 1).sum().backward()
    assert torch.equal(seen[0], y.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_and_keeps_as_little(reentrant) -> None:
    model, x = network(), leaf(2, 3, 6, 6)
    parameters = list(model.parameters())
    plain = gradients(lambda x, *_: model(x), x, *parameters)
    alive = []

    def run(x):
        h = model[0](x)
        alive.append(weakref.ref(h))
        return model[1:](h)

    out = checkpoint(run, x, use_reentrant=reentrant)
    assert alive[0]() is None
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    found = [out.detach(), x.grad, *(p.grad for p in parameters)]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tensors_may_be_kept_elsewhere() -> None:
    model, x = network(), leaf(2, 3, 6, 6)
    parameters = list(model.parameters())
    plain = gradients(lambda x, *_: model(x), x, *parameters)
    with torch.autograd.graph.save_on_cpu():
        elsewhere = gradients(lambda x, *_: model(x), x, *parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, elsewhere, strict=True))


def test_autocast_and_transforms_multiply_as_ever() -> None:
    x, w = leaf(5, 8), leaf(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(quantized(x), w * 1).dtype == torch.bfloat16
    y = quantized(x)
    slope = torch.func.grad(lambda w: linear(y.detach(), w * 1).sum())(w.detach())
    inside = torch.func.grad(lambda w: linear(y, w * 1).sum())(w.detach())
    assert torch.equal(slope, inside)


@pytest.mark.parametrize("quantized_inside", [False, True])
def test_dual_numbers_multiply_as_ever(quantized_inside) -> None:
    x, w, tangent = leaf(5, 8), leaf(4, 8), torch.randn(4, 8)
    y = quantized(x)
    with forward_ad.dual_level():
        y = quantized(x) if quantized_inside else y
        out = linear(y, forward_ad.make_dual(w, tangent))
        moved = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(moved, torch.nn.functional.linear(y, tangent))


@pytest.mark.parametrize(
    ("recompute", "kernels", "size", "expected"),
    [
        ("auto", "auto", 1, False),
        ("auto", "auto", 1 << 13, True),
        ("auto", "fused", 1 << 13, False),
        ("always", "fused", 1, True),
        ("never", "auto", 1 << 13, False),
    ],
)
def test_a_setting_says_when(recompute, kernels, size, expected, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "SMALLEST", 1 << 13)
    with qframework.settings.use(recompute=recompute, kernels=kernels):
        assert recomputes(quantized(leaf(1, size))) == expected
    with pytest.raises(ValueError, match="'auto', 'always', 'never'"):
        qframework.settings.recompute = "sometimes"
