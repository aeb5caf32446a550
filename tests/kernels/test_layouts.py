"""Fast forms of tensors that lie in memory in any way are those of their definitions, gradients in any layout included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qframework
from qframework import quantizers as q
from qframework.functional import IntegerGrid, fake_quantize
from qframework.kernels import native
from qframework.layers import QuantIdentity, QuantLinear
from qframework.proxy import QuantProxy

#: From a generator to values that lie in memory in some way.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(40, 24).t(),
    "heads of a transposed key": lambda: torch.randn(3, 10, 16).transpose(1, 2),
    "channels last": lambda: torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last),
    "channels last in three axes": lambda: torch.randn(2, 6, 30).permute(0, 2, 1),
    "every second column": lambda: torch.randn(20, 60)[:, ::2],
    "a chunk of columns": lambda: torch.randn(20, 96).chunk(3, dim=-1)[1],
    "a chunk in channels last": lambda: torch.randn(2, 12, 5, 7)
    .to(memory_format=torch.channels_last)
    .chunk(2, dim=1)[1],
    "some images in channels last": lambda: torch.randn(4, 6, 5, 7)
    .to(memory_format=torch.channels_last)[1::2],
    "expanded": lambda: torch.randn(20, 1).expand(20, 32),
}  # fmt: skip
#: From a result to its gradient.
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: torch.randn(y.shape),
    "like the result": lambda y: torch.randn_like(y),
    "expanded": lambda y: torch.randn(()).expand(y.shape),
    "a chunk": lambda y: torch.randn(*y.shape[:-1], 3 * y.shape[-1]).chunk(3, -1)[1],
}
ACTIVATIONS = [
    q.Int8ActPerTensorFloat,
    q.ShiftedUint8ActPerTensorFloat,
    q.Fp8e4m3OCPActPerTensorFloat,
    q.Int8DynamicActPerTensorFloat,
    q.Int8DynamicActPerRowFloat,
    q.SignedBinaryActPerTensorConst,
]
WEIGHTS = [
    q.Int8WeightPerTensorFloat,
    q.Int8WeightPerChannelFloat,
    q.ShiftedUint8WeightPerTensorFloat,
    q.ShiftedUint8WeightPerChannelFloat,
    q.Fp8e4m3OCPWeightPerTensorFloat,
    q.MXFloat8e4m3Weight,
    q.NF4WeightPerGroupFloat,
    q.SignedBinaryWeightPerTensorConst,
]


def layouts(*kinds: str) -> pytest.MarkDecorator:
    chosen = kinds or tuple(LAYOUTS)
    return pytest.mark.parametrize("layout", [LAYOUTS[k] for k in chosen], ids=chosen)


def quantized(proxy: QuantProxy, x: Tensor, gradient: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Values, scale and all gradients."""
    x = x.detach().requires_grad_()
    made = proxy(x)
    torch.manual_seed(1)
    leaves = [x, *(p for p in proxy.parameters() if p.requires_grad)]
    found = torch.autograd.grad(made.value, leaves, gradient(made.value), allow_unused=True)
    return [made.value, made.scale, *(g for g in found if g is not None)]


def assert_same(proxy: QuantProxy, x: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
    assert native.serves(x, (), "round") is not None
    values, scale, *gradients = quantized(proxy, x, gradient)
    with qframework.settings.use(kernels="reference"):
        *expected, of_x = quantized(proxy, x, gradient)[:3]
        more = quantized(proxy, x, gradient)[3:]
    assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1])
    assert len(gradients) == 1 + len(more)
    for found, right in zip(gradients, (of_x, *more), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@layouts()
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("quantizer", ACTIVATIONS, ids=lambda quantizer: quantizer.__name__)
def test_activations(quantizer, layout, gradient) -> None:
    torch.manual_seed(0)
    x = layout()
    layer = QuantIdentity(act_quant=quantizer, collect_stats_steps=1)
    layer(x)
    layer(x)
    assert_same(layer.act_quant, x, gradient)


@layouts("transposed", "every second column", "a chunk of columns", "expanded")
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("quantizer", WEIGHTS, ids=lambda quantizer: quantizer.__name__)
def test_weights(quantizer, layout, gradient) -> None:
    torch.manual_seed(0)
    weight = torch.cat([layout()] * 4)[:32] if quantizer is q.NF4WeightPerGroupFloat else layout()
    options = {"weight_scaling_init": 0.7} if "Const" in quantizer.__name__ else {}
    if "Group" in quantizer.__name__ or "MX" in quantizer.__name__:
        options["weight_group_size"] = weight.shape[1] // 2
    rows, columns = weight.shape
    layer = QuantLinear(columns, rows, bias=False, weight_quant=quantizer, **options)
    layer.weight.data = weight
    assert_same(layer.weight_quant, weight, gradient)


@layouts("channels last", "a chunk in channels last", "some images in channels last")
@pytest.mark.parametrize("ties", [False, True])
def test_the_first_of_several_largest_magnitudes_gets_the_gradient(layout, ties) -> None:
    torch.manual_seed(0)
    weight = layout()
    if ties:
        weight = weight.mul(4).round()
    layer = qframework.layers.QuantConv2d(
        weight.shape[1], weight.shape[0], weight.shape[2:], bias=False,
        weight_quant=q.Int8WeightPerChannelFloat,
    )  # fmt: skip
    layer.weight.data = weight
    assert_same(layer.weight_quant, weight, GRADIENTS["like the result"])


@layouts()
@pytest.mark.parametrize("relu", [False, True])
def test_a_scale_that_stays(layout, relu) -> None:
    x, grid = layout(), IntegerGrid(0.0, 15.0)
    scale = torch.tensor(0.1)
    known = native.StaticQuantizer.for_values(torch.randn(500), scale, None, grid)
    y = fake_quantize.definition(x, scale, None, grid, relu)
    found = known(x, relu)
    dense = x.numel() == x.untyped_storage().nbytes() // 4
    assert (found is not None) == dense  # others go the ordinary way
    for made in [fake_quantize(x, scale, None, grid, relu)] + ([found] if dense else []):
        assert torch.equal(made, y) and made.stride() == y.stride()
