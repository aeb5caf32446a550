"""Small networks again in integers: the codes of every layer, and accumulators within their declared bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_attention import encoder_layer
from integer_machine import (
    ARITHMETIC,
    Integers,
    add,
    assert_same,
    bias_on,
    enlarge,
    grid_of,
    linear,
    quantize,
    requantize,
    settle,
    varied,
)
from integer_recurrent import lstm, run
from test_integer_execution_attention import build_encoder_layer
from torch import Tensor, nn

from qframework.graph import calibration_mode
from qframework.layers import (
    QuantConv2d,
    QuantEltwiseAdd,
    QuantEmbedding,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantReLU,
    QuantTanh,
    TruncAvgPool2d,
)
from qframework.quant_tensor import QuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFloat,
)

BITS = (8, 4)
CHANNELS = {"float": Int8WeightPerChannelFloat, "powers": Int8WeightPerChannelFixedPoint}
SHIFTED = {"float": ShiftedUint8ActPerTensorFloat, "powers": ShiftedUint8ActPerTensorFixedPoint}


def seen_in(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """What each module gives in evaluation after calibration; quantized tensors only."""
    enlarge(model)
    settle(model, *inputs)
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, given, out: seen.update({name: out})

    hooks = [
        m.register_forward_hook(keep(n))
        for n, m in model.named_modules()
        if n and "quant" not in n and "act_" not in n
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return {n: t for n, t in seen.items() if isinstance(t, QuantTensor)}


def assert_all_same(seen: dict[str, Any], expected: dict[str, Integers]) -> None:
    assert seen.keys() == expected.keys()
    for name, integers in expected.items():
        assert_same(seen[name], integers)
    assert varied(list(expected.values())[-1])


def activation(layer: Any, x: Integers | Tensor) -> Integers:
    """A function and the next quantizer; accumulators may have a scale for each channel."""
    value = x.value if isinstance(x, Integers) else x.double()
    function = layer.act_quant.activation_impl
    return quantize(layer.act_quant, value if function is None else function(value))


def convolution(layer: Any, x: Integers) -> Integers:
    """The accumulator of a 2-d convolution: a matrix product for each position."""
    weight = quantize(layer.weight_quant, layer.weight)
    (height, width), (down, right) = layer.kernel_size, layer.stride
    pad = layer.padding
    codes = nn.functional.pad(x.centered, (pad[1], pad[1], pad[0], pad[0]))
    patches = codes.unfold(2, height, down).unfold(3, width, right)  # N C Y X h w
    outputs = []
    for i, kernel in enumerate(weight.codes.chunk(layer.groups)):
        size = kernel.shape[1]
        part = patches[:, i * size : (i + 1) * size].permute(0, 2, 3, 1, 4, 5).flatten(3)
        outputs.append((part @ kernel.flatten(1).t()).permute(0, 3, 1, 2))
    acc = Integers(torch.cat(outputs, 1), x.scale * weight.scale.reshape(-1, 1, 1).squeeze())
    acc = acc._replace(scale=acc.scale.reshape(-1, 1, 1))
    bias = layer.bias.reshape(-1, 1, 1)
    return add(acc, bias_on(acc.scale, bias))


def windows(x: Integers, size: int) -> Tensor:
    return x.codes.unfold(2, size, size).unfold(3, size, size).flatten(-2)


def average(layer: Any, x: Integers, bits: int) -> Integers:
    """The sum of windows of unsigned integers, shifted to 8 bits, rounded half to even."""
    area = layer.kernel_size**2
    total = windows(x, layer.kernel_size).sum(-1)
    needed = (area * (2**bits - 1)).bit_length()
    divisor = 2.0 ** (needed - 8)
    codes = torch.round(total.double() / divisor).clamp(0, 255).long()
    return Integers(codes, x.scale / area * divisor)


# ------------------------------------------------------------------ networks


class Perceptron(nn.Module):
    def __init__(self, kind: str, quantizers: Any, bits: int, shifted: bool) -> None:
        super().__init__()
        weight, signed, unsigned = quantizers
        first = SHIFTED[kind] if shifted else signed
        both: Any = {"return_quant_tensor": True, "bit_width": bits}
        options: Any = {"bias_quant": Int32Bias, "weight_bit_width": bits}
        self.enter = QuantIdentity(first, **both)
        # The zero point of an input makes the plain product unquantized.
        own = {"return_quant_tensor": not shifted, **options}
        self.first = QuantLinear(6, 9, weight_quant=CHANNELS[kind], **own)
        self.relu = QuantReLU(unsigned, **both)
        self.second = QuantLinear(9, 8, weight_quant=weight, return_quant_tensor=True, **options)
        self.tanh = QuantTanh(signed, **both)
        options["bias_quant"] = None
        self.third = QuantLinear(8, 5, weight_quant=CHANNELS[kind], bias=False, return_quant_tensor=True, weight_bit_width=bits)  # fmt: skip

    def forward(self, x: Any) -> Any:
        x = self.relu(self.first(self.enter(x)))
        return self.third(self.tanh(self.second(x)))

    def in_integers(self, x: Tensor) -> dict[str, Integers]:
        entered = activation(self.enter, x)
        first = linear(self.first, entered)
        relu = activation(self.relu, first)
        second = linear(self.second, relu)
        tanh = activation(self.tanh, second)
        found = {"enter": entered, "first": first, "relu": relu, "second": second, "tanh": tanh}
        return {**found, "third": linear(self.third, tanh)}


class Residual(nn.Module):
    """Convolutions, max pooling, a residual sum on one grid, average pooling, a classifier."""

    def __init__(self, kind: str, quantizers: Any, bits: int) -> None:
        super().__init__()
        weight, signed, unsigned = quantizers
        self.bits = bits
        both: Any = {"return_quant_tensor": True, "bit_width": bits}
        options: Any = {"bias_quant": Int32Bias, "return_quant_tensor": True, "weight_bit_width": bits}  # fmt: skip
        self.enter = QuantIdentity(signed, **both)
        self.stem = QuantConv2d(2, 4, 3, padding=1, weight_quant=CHANNELS[kind], **options)
        self.relu = QuantReLU(unsigned, **both)
        self.pool = nn.MaxPool2d(2)
        self.branch = QuantConv2d(4, 4, 3, padding=1, groups=2, weight_quant=weight, **options)
        self.sum = QuantEltwiseAdd(signed, None, return_quant_tensor=True, input_bit_width=bits)
        self.last = QuantReLU(unsigned, **both)
        self.average = TruncAvgPool2d(2)
        self.classes = QuantLinear(4 * 2 * 3, 5, weight_quant=weight, **options)

    def forward(self, x: Any) -> Any:
        x = self.pool(self.relu(self.stem(self.enter(x))))
        x = self.last(self.sum(x, self.branch(x)))
        return self.classes(self.average(x).flatten(1))

    def in_integers(self, x: Tensor) -> dict[str, Integers]:
        entered = activation(self.enter, x)
        stem = convolution(self.stem, entered)
        relu = activation(self.relu, stem)
        pool = relu._replace(codes=windows(relu, 2).amax(-1))
        branch = convolution(self.branch, pool)
        terms = (requantize(self.sum.input_quant, t) for t in (pool, branch))
        total = add(*terms)
        last = activation(self.last, total)
        mean = average(self.average, last, self.bits)
        classes = linear(self.classes, mean.view(lambda codes: codes.flatten(1)))
        found = {"enter": entered, "stem": stem, "relu": relu, "pool": pool, "branch": branch}
        return {**found, "sum": total, "last": last, "average": mean, "classes": classes}


class Sequence(nn.Module):
    """Words in, an LSTM of both directions, classes out of its last states."""

    def __init__(self, quantizers: Any, bits: int, coupled: bool) -> None:
        super().__init__()
        weight, signed, unsigned = quantizers
        kinds = {"weight": weight, "io": signed, "gate_acc": signed, "sigmoid": unsigned, "tanh": signed, "cell_state": signed}  # fmt: skip
        options = {f"{n}_quant": q for n, q in kinds.items()}
        options |= {f"{n}_bit_width": bits for n in kinds}
        self.words = QuantEmbedding(11, 6, weight_quant=weight, return_quant_tensor=True)
        self.memory = QuantLSTM(
            6,
            4,
            bidirectional=True,
            batch_first=True,
            coupled_input_forget_gates=coupled,
            return_quant_tensor=True,
            **options,
        )
        self.classes = QuantLinear(
            8, 5, weight_quant=weight, bias_quant=Int32Bias, return_quant_tensor=True
        )

    def forward(self, words: Tensor) -> Any:
        return self.classes(self.memory(self.words(words))[0][:, -1])

    def in_integers(self, words: Tensor) -> dict[str, Integers]:
        table = quantize(self.words.weight_quant, self.words.weight)
        rows = table.view(lambda codes: codes[words])
        x = requantize(self.memory.io_quant, rows).view(lambda codes: codes.transpose(0, 1))
        out, _ = run(self.memory, lstm, x, [None, None])
        classes = linear(self.classes, out.view(lambda codes: codes[-1]))
        return {"words": rows, "classes": classes}


class Encoder(nn.Module):
    """Two transformer layers and a classifier on the first position."""

    def __init__(self, quantizers: Any, bits: int, norm_first: bool) -> None:
        super().__init__()
        layer = build_encoder_layer(quantizers, bits, norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classes = QuantLinear(
            8, 5, weight_quant=quantizers[0], bias_quant=Int32Bias, return_quant_tensor=True
        )

    def forward(self, x: Tensor) -> Any:
        return self.classes(self.encoder(x)[:, 0])

    def in_integers(self, x: Any) -> dict[str, Integers]:
        found = {}
        for i, layer in enumerate(self.encoder.layers):
            x = encoder_layer(layer, x, None)
            found[f"encoder.layers.{i}"] = x
        found["encoder"] = x
        return {**found, "classes": linear(self.classes, x.view(lambda codes: codes[:, 0]))}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_perceptron_is_its_integer_machine(shifted, bits, arithmetic) -> None:
    quantizers, dtype = ARITHMETIC[arithmetic]
    torch.manual_seed(bits + shifted)
    model = Perceptron(arithmetic.split("-")[0], quantizers, bits, shifted).to(dtype)
    x = torch.randn(7, 6, dtype=dtype) + 0.5
    seen = seen_in(model, x)
    expected = model.in_integers(x)
    if shifted:
        del expected["first"]
    assert_all_same(seen, expected)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
def test_a_residual_network_is_its_integer_machine(bits, arithmetic) -> None:
    quantizers, dtype = ARITHMETIC[arithmetic]
    torch.manual_seed(bits)
    model = Residual(arithmetic.split("-")[0], quantizers, bits).to(dtype)
    x = torch.randn(2, 2, 8, 12, dtype=dtype)
    assert_all_same(seen_in(model, x), model.in_integers(x))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("coupled", [False, True])
def test_an_lstm_classifier_is_its_integer_machine(coupled, bits, arithmetic) -> None:
    quantizers, dtype = ARITHMETIC[arithmetic]
    torch.manual_seed(bits + coupled)
    model = Sequence(quantizers, bits, coupled).to(dtype)
    words = torch.randint(0, 11, (3, 6))
    assert_all_same(seen_in(model, words), model.in_integers(words))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder_is_its_integer_machine(norm_first, bits, arithmetic) -> None:
    quantizers, dtype = ARITHMETIC[arithmetic]
    torch.manual_seed(bits + norm_first)
    model = Encoder(quantizers, bits, norm_first).to(dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    seen = seen_in(model, x)
    expected = model.in_integers(x)
    assert_all_same({n: seen[n] for n in expected}, expected)


def sums_with_ties(quantizer: Any) -> tuple[Any, Tensor, Integers, Tensor]:
    """A sum whose scale is twice that of its operands, so that odd sums lie between two integers.

    Returns:
        Codes of the layer, the exact sum in its steps, the machine's result, and where ties are.
    """
    torch.manual_seed(0)
    a, b = torch.randn(2, 500).clamp(-3, 3).unbind()
    a[0] = b[0] = 3.3  # the largest operands meet, as outliers of one channel do
    layer = QuantEltwiseAdd(quantizer, quantizer, return_quant_tensor=True)
    with calibration_mode(layer):
        layer(a, b)
    layer.eval()
    out = layer(a, b)
    total = add(*(quantize(layer.input_quant, t) for t in (a, b)))
    grid = grid_of(layer.output_quant)
    assert torch.equal(grid.scale, 2 * total.scale)
    exact = total.codes / 2.0
    return out, exact, grid.take(exact), grid.is_tie(exact)


def test_ties_go_to_the_even_integer_where_scales_are_powers_of_two() -> None:
    out, _, expected, ties = sums_with_ties(Int8ActPerTensorFixedPoint)
    assert int(ties.sum()) > 100
    assert_same(out, expected)
    assert bool((expected.codes[ties] % 2 == 0).all())


def test_of_other_scales_rounding_errors_decide_on_ties_and_on_nothing_else() -> None:
    """Values are floats: an odd number of steps is divided by two steps, and may come out beside the half."""
    out, exact, expected, ties = sums_with_ties(Int8ActPerTensorFloat)
    off = out.int().long() - expected.codes
    assert bool(off.any()) and not bool(off[~ties].any())
    assert bool(((out.int() - exact).abs() <= 0.5)[ties].all())
