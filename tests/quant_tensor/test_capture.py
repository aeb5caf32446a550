"""Quantized tensors inside torch.compile and torch.export."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.quant_tensor import IntQuantTensor, dequantize


class Source:
    """Stands for a quantizer."""


class Quantize(nn.Module):
    """The least that a layer does."""

    def __init__(self, shape=(), zero_point: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, 0.1))
        self.register_buffer("bits", torch.tensor(8.0))
        self.register_buffer("zero_point", torch.tensor(zero_point))
        self.source, self.symmetric = Source(), zero_point == 0

    def forward(self, x: Tensor) -> IntQuantTensor:
        q = x / self.scale + self.zero_point
        q = q + (q.round().clamp(-128, 127) - q).detach()
        return IntQuantTensor.unchecked(
            (q - self.zero_point) * self.scale,
            self.scale,
            self.zero_point,
            self.bits,
            True,
            self.training,
            self.source,
            self.symmetric,
            True,
        )


class Network(nn.Module):
    def __init__(self, shape=(), zero_point: float = 0.0) -> None:
        super().__init__()
        self.quantize, self.weight = Quantize(shape, zero_point), Quantize()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[object, ...]:
        a, other = self.quantize(x), self.quantize(2 * x)
        relu = F.relu(a)
        turned = a.permute(0, 2, 1, 3) - other.permute(0, 2, 1, 3)
        return (
            F.conv2d(a, self.weight(self.conv.weight), self.conv.bias, padding=1),
            torch.cat([relu, F.max_pool2d(other, 3, 1, 1)], 1),
            torch.cat([a + other, a + relu], 1),
            turned,
            a.flatten(2) + other.reshape(other.shape[0], 4, -1),
            a[:, :2] + other[:, :2],
            abs(-a),
            1 - a.set(bit_width=9),
            a.chunk(2, 1)[0],
        )


def loss(outputs: tuple[object, ...]) -> Tensor:
    return sum(
        (o.value.sin().sum() + o.scale.sum() + o.bit_width.sum())
        if isinstance(o, IntQuantTensor)
        else o.sin().sum()
        for o in outputs
    )


def agree(got: tuple[object, ...], expected: tuple[object, ...]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert type(g) is type(e)
        torch.testing.assert_close(dequantize(g), dequantize(e))
        if isinstance(e, IntQuantTensor):
            for name in ("scale", "bit_width"):
                torch.testing.assert_close(getattr(g, name), getattr(e, name))
            assert (g.signed, g.training, g.symmetric) == (e.signed, e.training, e.symmetric)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(), (1, 4, 1, 1)], ids=["one scale", "scale per channel"])
def test_compiled_and_exported_networks_agree_with_eager_ones(shape, training) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    network = Network(shape).train(training)
    x = torch.randn(2, 4, 6, 6)
    eager = network(x)
    loss(eager).backward()
    expected = {n: p.grad for n, p in network.named_parameters()}
    assert expected["quantize.scale"].abs().sum() > 0
    network.zero_grad()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    agree(compiled, eager)
    loss(compiled).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (x,), dynamic_shapes=batch).module()
    agree(program(x), eager)
    more = torch.randn(3, 4, 6, 6)
    agree(program(more), network(more))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own, 2.11
def test_exported_programs_with_quantized_outputs_are_saved_and_loaded() -> None:
    quantize, x, file = Quantize().eval(), torch.randn(2, 4), io.BytesIO()
    torch.export.save(torch.export.export(quantize, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()(x)
    agree((loaded,), (quantize(x),))
    assert loaded.is_valid


@pytest.mark.slow
def test_different_quantizers_are_refused_while_tracing() -> None:
    torch.compiler.reset()
    one, two = Quantize().eval(), Quantize().eval()
    x = torch.randn(2, 4)
    assert (one(x) + two(x)).is_valid  # eager: their numbers agree

    def add(x: Tensor) -> Tensor:
        return (one(x) + two(x)).value

    with pytest.raises(Exception, match=r"can't.*be known to be the same while tracing"):
        torch.compile(add, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.slow
def test_shifted_tensors_are_joined_while_tracing() -> None:
    torch.compiler.reset()
    quantize = Quantize(zero_point=3.0).eval()

    def join(x: Tensor) -> IntQuantTensor:
        q = quantize(x)
        return torch.cat([q, q + q.flip(0) - quantize(x)])

    x = torch.randn(2, 4)
    out = torch.compile(join, fullgraph=True, backend="aot_eager")(x)
    assert out.is_valid
    assert out.bit_width.item() >= 9
    zero = torch.compile(
        lambda v: F.relu(IntQuantTensor(v, 0.1, 0, 8, True)), fullgraph=True, backend="aot_eager"
    )
    assert zero(x).symmetric


@pytest.mark.slow
def test_a_module_without_a_rule_decays_it_in_a_compiled_graph_too() -> None:
    model = nn.Sequential(Quantize(), nn.LayerNorm(8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), model(x))
