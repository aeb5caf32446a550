"""Quantized tensors between layers under torch.compile and torch.export: no graph break, no recompile, same numbers."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    Uint8ActPerTensorFixedPoint,
)


class Residual(nn.Module):
    """Every kind of hand-over: shared quantizer, residual sum, pooling, flattening, bias on the input's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantIdentity(return_quant_tensor=True, collect_stats_steps=2)
        self.conv1 = QuantConv2d(
            1,
            4,
            3,
            padding=1,
            bias_quant=Int32Bias,
            return_quant_tensor=True,
            weight_bit_width=4,
            weight_bit_width_impl_type="parameter",
        )
        self.relu = QuantReLU(
            act_quant=Uint8ActPerTensorFixedPoint, return_quant_tensor=True, collect_stats_steps=2
        )
        self.conv2 = QuantConv2d(
            4,
            4,
            3,
            padding=1,
            bias=False,
            weight_quant=Int8WeightPerChannelFloat,
            return_quant_tensor=True,
        )
        self.again = QuantReLU(act_quant=self.relu.act_quant, return_quant_tensor=True)
        self.shift = QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=2)
        self.quant2 = QuantIdentity(return_quant_tensor=True, collect_stats_steps=2)
        self.head = QuantLinear(64, 3, bias_quant=Int32Bias, return_quant_tensor=True)

    def forward(self, x: torch.Tensor) -> IntQuantTensor:
        x = self.relu(self.conv1(self.quant(x)))
        x = x + self.again(self.conv2(x))
        x = torch.nn.functional.max_pool2d(x, 2)
        return self.head(self.quant2(self.shift(x.flatten(1))))


def gradients(model: nn.Module, out: IntQuantTensor) -> list[torch.Tensor]:
    loss = out.value.pow(2).sum() + 1e3 * out.scale.sum() + out.bit_width
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.slow
def test_compiled_training_and_evaluation_equal_eager_without_recompiling() -> None:
    torch.manual_seed(0)
    eager = Residual()
    compiled_model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(compiled_model, fullgraph=True, backend=counter)
    for _ in range(6):  # collects twice, hands over, learns
        x = torch.randn(2, 1, 8, 8)
        out, expected = compiled(x), eager(x)
        assert isinstance(out, IntQuantTensor)
        torch.testing.assert_close(out.value, expected.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.scale, expected.scale)
        assert out.bit_width == expected.bit_width
        for a, b in zip(gradients(compiled_model, out), gradients(eager, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))
    assert counter.frame_count == 1
    mine, theirs = compiled_model.state_dict(), eager.state_dict()
    assert list(mine) == list(theirs)
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor)
    compiled_model.eval()
    eager.eval()
    for _ in range(3):
        x = torch.randn(2, 1, 8, 8)
        out, expected = compiled(x), eager(x)
        torch.testing.assert_close(out.value, expected.value, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.int(), expected.int())
    assert counter.frame_count == 2


@pytest.mark.slow
def test_every_quantizer_of_a_layer_is_compiled() -> None:
    layer = QuantLinear(
        6,
        4,
        input_quant=Int8ActPerTensorFloat,
        output_quant=Int8ActPerTensorFloat,
        bias_quant=Int32Bias,
        input_bit_width=3,
        output_bit_width=3,
    )
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled.eval()
    layer.eval()
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    assert out.unique().numel() <= 8


@pytest.mark.slow
def test_large_batches_are_collected_under_a_compiler_too() -> None:
    eager = QuantReLU(collect_stats_steps=2)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(4, 16, 32, 32)
        one, other = (x.clone().requires_grad_() for _ in range(2))
        a, b = eager(one), compiled(other)
        assert torch.equal(a, b)
        (a * a.detach()).sum().backward()
        (b * b.detach()).sum().backward()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    mine, theirs = (m.act_quant.tensor_quant.state_dict() for m in (traced, eager))
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*NaN or infinity is left out")
def test_a_poisoned_batch_is_left_out_under_a_compiler_too() -> None:
    eager = QuantIdentity(collect_stats_steps=4)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for number in (float("nan"), 6.0, 3.0):
        eager(torch.tensor([number]))
        compiled(torch.tensor([number]))
    mine, theirs = (m.act_quant.tensor_quant.scaling_impl for m in (traced, eager))
    assert mine.running_stats.item() == theirs.running_stats.item() == pytest.approx(5.7)
    assert int(mine.used_batches) == int(theirs.used_batches) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.export looks at it
@pytest.mark.parametrize("training", [False, True])
def test_exported_programs_hold_quantized_tensors(training) -> None:
    torch.manual_seed(0)
    model = Residual()
    for _ in range(4):
        model(torch.randn(2, 1, 8, 8))
    model.train(training)
    x = torch.randn(2, 1, 8, 8)
    program = torch.export.export(copy.deepcopy(model), (x,))
    out = program.module()(x)
    assert isinstance(out, IntQuantTensor)
    torch.testing.assert_close(out.value, model(x).value)


@pytest.mark.slow
def test_tensors_from_two_quantizers_are_refused_while_tracing() -> None:
    first, second = QuantIdentity(return_quant_tensor=True), QuantIdentity(return_quant_tensor=True)
    for module in (first, second):
        module(torch.ones(3))
        module.eval()

    def add(x: torch.Tensor) -> torch.Tensor:
        return (first(x) + second(x)).value

    with pytest.raises(Exception, match="different quantizers"):
        torch.compile(add, fullgraph=True, backend="eager")(torch.ones(3))


@pytest.mark.slow
def test_batches_of_other_sizes_compile_as_often_as_float_layers() -> None:
    def graphs(conv: nn.Module, relu: nn.Module, shift: nn.Module, head: nn.Module) -> int:
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = nn.Sequential(conv, relu, shift, nn.Flatten(), head)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for size in (8, 8, 8, 5, 7, 64, 3):
            compiled(torch.randn(size, 3, 8, 8)).sum().backward()
        return counter.frame_count

    relu = QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, collect_stats_steps=2)
    shift = QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, collect_stats_steps=2)
    quantized = graphs(QuantConv2d(3, 4, 3), relu, shift, QuantLinear(144, 5))
    assert quantized == graphs(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity(), nn.Linear(144, 5))
