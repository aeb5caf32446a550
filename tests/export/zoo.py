"""Small networks of all kinds with calibrated quantizers, for exports."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.graph import calibration_mode
from qframework.layers import (
    QuantCat,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantEltwiseAdd,
    QuantEmbedding,
    QuantGRU,
    QuantIdentity,
    QuantLayerNorm,
    QuantLinear,
    QuantLSTM,
    QuantMultiheadAttention,
    QuantReLU,
    QuantRNN,
    QuantSigmoid,
    QuantTransformerEncoderLayer,
    TruncAvgPool2d,
)
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Fp8e4m3OCPWeightPerChannelFloat,
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryActPerTensorConst,
    SignedTernaryWeightPerTensorConst,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)

#: For tests that execute QONNX.
needs_qonnx = pytest.mark.skipif(find_spec("qonnx") is None, reason="qonnx is not installed")


class Grids(NamedTuple):
    """Quantizers of weights, of signed and of unsigned activations."""

    weight: Any
    act: Any
    positive: Any

    @property
    def powers(self) -> bool:
        return self.weight.__name__.endswith("FixedPoint")


GRIDS = {
    "tensor": Grids(Int8WeightPerTensorFloat, Int8ActPerTensorFloat, Uint8ActPerTensorFloat),
    "channel": Grids(Int8WeightPerChannelFloat, Int8ActPerTensorFloat, Uint8ActPerTensorFloat),
    "shifted": Grids(
        Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat, Uint8ActPerTensorFloat
    ),
    "powers": Grids(
        Int8WeightPerTensorFixedPoint, Int8ActPerTensorFixedPoint, Uint8ActPerTensorFixedPoint
    ),
    "powers-channel": Grids(
        Int8WeightPerChannelFixedPoint, Int8ActPerTensorFixedPoint, Uint8ActPerTensorFixedPoint
    ),
    "powers-shifted": Grids(
        Int8WeightPerChannelFixedPoint,
        ShiftedUint8ActPerTensorFixedPoint,
        Uint8ActPerTensorFixedPoint,
    ),
}
BITS = (8, 4, 3, 2)


class Net(nn.Module):
    """Base: keywords of weights and activations."""

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__()
        self.grids = grids
        self.w = {"weight_quant": grids.weight, "weight_bit_width": bits}
        self.act = {"act_quant": grids.act, "bit_width": bits}
        self.pos = {"act_quant": grids.positive, "bit_width": bits}
        self.bias = {"bias_quant": Int32Bias}
        self.image = QuantIdentity(grids.act, return_quant_tensor=True)
        self.last = QuantIdentity(grids.act)


class LeNet(Net):
    shape = (1, 12, 12)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv1 = QuantConv2d(1, 6, 3, **self.w, **self.bias)
        self.relu1 = QuantReLU(**self.pos, return_quant_tensor=True)
        self.conv2 = QuantConv2d(6, 8, 3, **self.w, **self.bias)
        self.relu2 = QuantReLU(**self.pos, return_quant_tensor=True)
        self.fc = QuantLinear(8 * 4, 10, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.conv1(self.image(x))), 2)
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)[:, :, :2, :2]
        return self.last(self.fc(F.pad(x, (0, 1, 0, 1))[:, :, :2, :2].flatten(1)))


class Folded(Net):
    """A batch norm folded into its convolution."""

    shape = (3, 6, 6)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv1 = QuantConv2d(3, 8, 3, padding=1, **self.w, **self.bias)
        bn = nn.BatchNorm2d(8)
        nn.init.uniform_(bn.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
        nn.init.uniform_(bn.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        self.conv1.merge_bn_in(bn)
        self.relu1 = QuantReLU(**self.pos)
        self.conv2 = QuantConv2d(8, 8, 3, bias=False, **self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv2(self.relu1(self.conv1(self.image(x)))))


class Normed(Folded):
    """And one that stays, behind another convolution."""

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn2(self.conv2(self.relu1(self.conv1(self.image(x))))))


class Residual(Net):
    shape = (3, 6, 6)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv1 = QuantConv2d(3, 4, 3, padding=1, **self.w, **self.bias)
        self.relu1 = QuantReLU(**self.pos, return_quant_tensor=True)
        self.conv2 = QuantConv2d(4, 4, 3, padding=1, **self.w, **self.bias)
        self.add = QuantEltwiseAdd(
            input_quant=grids.act,
            input_bit_width=bits,
            output_quant=grids.act,
            return_quant_tensor=True,
        )
        self.conv3 = QuantConv2d(4, 4, 1, stride=2, **self.w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(self.image(x)))
        return self.last(self.conv3(self.add(x, self.conv2(x))))


class Depthwise(Net):
    shape = (4, 6, 6)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv1 = QuantConv2d(4, 8, 3, padding=1, groups=4, **self.w, **self.bias)
        self.relu1 = QuantReLU(**self.pos, return_quant_tensor=True)
        self.conv2 = QuantConv2d(8, 8, 1, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv2(self.relu1(self.conv1(self.image(x)))))


class Transposed(Net):
    shape = (4, 4, 4)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.up = QuantConvTranspose2d(4, 6, 3, stride=2, output_padding=1, **self.w, **self.bias)
        self.relu1 = QuantReLU(**self.pos, return_quant_tensor=True)
        self.conv = QuantConv2d(6, 4, 3, dilation=2, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.relu1(self.up(self.image(x)))))


class Truncated(Net):
    shape = (3, 8, 8)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv = QuantConv2d(3, 6, 3, padding=1, **self.w, **self.bias)
        self.relu = QuantReLU(**self.pos, return_quant_tensor=True)
        self.pool = TruncAvgPool2d(2, bit_width=bits)
        self.fc = QuantLinear(6 * 16, 10, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv(self.image(x))))
        return self.last(self.fc(x.flatten(1)))


class Joined(Net):
    shape = (3, 5, 5)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.left = QuantConv2d(3, 4, 3, padding=1, **self.w)
        self.right = QuantConv2d(3, 4, 1, **self.w)
        self.cat = QuantCat(
            grids.act,
            grids.act,
            tie_input_output_quant=True,
            output_bit_width=bits,
            return_quant_tensor=True,
        )
        self.conv = QuantConv2d(8, 4, 1, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x)
        return self.last(self.conv(self.cat([self.left(x), self.right(x)])))


class Words(Net):
    """A table, a norm over features, a linear layer over three axes."""

    shape = (10,)
    words = 50

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        del self.image
        table = Int8WeightPerTensorFixedPoint if grids.powers else Int8WeightPerTensorFloat
        self.table = QuantEmbedding(50, 8, weight_quant=table, weight_bit_width=bits)
        self.norm = QuantLayerNorm(
            8, output_quant=grids.act, output_bit_width=bits, return_quant_tensor=True, **self.w
        )
        self.fc = QuantLinear(8, 10, **self.w, **self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.norm(self.table(x))))


class Recurrent(Net):
    shape = (6, 5)
    layer: Any = None
    options: dict[str, Any] = {}

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        del self.image
        quantizers = {"io_quant": grids.act, "gate_acc_quant": grids.act, **self.options}
        for name, value in list(quantizers.items()):
            if isinstance(value, str):
                quantizers[name] = getattr(grids, value)
        self.rnn = self.layer(
            5, 8, batch_first=True, weight_quant=grids.weight, weight_bit_width=bits, **quantizers
        )

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.last(out)


class RNN(Recurrent):
    layer = QuantRNN


class LSTM(Recurrent):
    layer = QuantLSTM
    options = {"sigmoid_quant": "positive", "tanh_quant": "act", "cell_state_quant": "act"}


class GRU(Recurrent):
    layer = QuantGRU
    options = {"sigmoid_quant": "positive", "tanh_quant": "act"}


class Attention(Net):
    shape = (5, 8)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.attention = QuantMultiheadAttention(
            8,
            2,
            batch_first=True,
            in_proj_weight_quant=grids.weight,
            in_proj_weight_bit_width=bits,
            out_proj_weight_quant=grids.weight,
            q_scaled_quant=grids.act,
            k_transposed_quant=grids.act,
            v_quant=grids.act,
            attn_output_weights_quant=grids.positive,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Encoder(Net):
    shape = (5, 8)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.encoder = QuantTransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.image(x)))


class Signs(Net):
    """Binary or ternary weights and activations."""

    shape = (3, 6, 6)
    weight: Any = SignedBinaryWeightPerTensorConst
    kind: Any = SignedBinaryActPerTensorConst

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        w = {"weight_quant": self.weight, "weight_scaling_init": 0.25}
        self.conv1 = QuantConv2d(3, 8, 3, padding=1, **w)
        self.sign = QuantIdentity(self.kind, scaling_init=0.5, return_quant_tensor=True)
        self.conv2 = QuantConv2d(8, 4, 3, **w)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv2(self.sign(self.conv1(self.image(x)))))


class Ternary(Signs):
    weight = SignedTernaryWeightPerTensorConst
    kind = SignedTernaryActPerTensorConst


class Float8(Net):
    shape = (3, 6, 6)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv1 = QuantConv2d(3, 8, 3, weight_quant=Fp8e4m3OCPWeightPerChannelFloat)
        self.relu = nn.ReLU()
        self.middle = QuantIdentity(Fp8e4m3OCPActPerTensorFloat, return_quant_tensor=True)
        self.fc = QuantLinear(8 * 16, 10, weight_quant=Fp8e4m3OCPWeightPerChannelFloat)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.relu(self.conv1(self.image(x))))
        return self.last(self.fc(x.flatten(1)))


class Gates(Net):
    """Functions behind accumulators."""

    shape = (3, 6, 6)

    def __init__(self, grids: Grids, bits: int) -> None:
        super().__init__(grids, bits)
        self.conv = QuantConv2d(3, 4, 3, **self.w, **self.bias)
        self.sigmoid = QuantSigmoid(**self.pos, return_quant_tensor=True)
        self.fc = QuantLinear(64, 10, **self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.sigmoid(self.conv(self.image(x))).flatten(1)))


NETS: dict[str, type[Net]] = {
    n.__name__: n
    for n in (
        LeNet,
        Folded,
        Normed,
        Residual,
        Depthwise,
        Transposed,
        Truncated,
        Joined,
        Words,
        RNN,
        LSTM,
        GRU,
        Attention,
        Encoder,
        Signs,
        Ternary,
        Float8,
        Gates,
    )
}
#: Networks with functions, which aren't exact whatever the scales.
WITH_FUNCTIONS = {
    "Normed",
    "Words",
    "RNN",
    "LSTM",
    "GRU",
    "Attention",
    "Encoder",
    "Float8",
    "Gates",
}


def data(net: type[Net], count: int) -> Tensor:
    if hasattr(net, "words"):
        return torch.randint(0, net.words, (count, *net.shape))  # type: ignore[attr-defined]
    return torch.randn(count, *net.shape)  # type: ignore[attr-defined]


def calibrated(model: nn.Module, *inputs: Any) -> nn.Module:
    """The model in evaluation mode, its scales taken from a run."""
    model.eval()
    with calibration_mode(model), torch.no_grad():
        model(*inputs)
    return model


def build(
    name: str, grids: str = "channel", bits: int = 8, seed: int = 0
) -> tuple[nn.Module, Tensor]:
    """A calibrated network, and the data that it was calibrated by."""
    torch.manual_seed(seed)
    kind = NETS[name]
    model = kind(GRIDS[grids], bits)
    x = data(kind, 32)
    return calibrated(model, x), x


Builder = Callable[[], tuple[nn.Module, Tensor]]
