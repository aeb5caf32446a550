"""A small network on handwritten digits, float and quantized."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qframework.graph import calibration_mode, quantize_model
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias


def images() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)[:256], torch.tensor(y)[:256]


def networks() -> tuple[nn.Module, nn.Module]:
    """A float model, and the same quantized and calibrated."""
    torch.manual_seed(0)
    x, _ = images()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    ).eval()  # fmt: skip
    quantized, _ = quantize_model(
        model,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=4,
        input_quant=Int8ActPerTensorFloat,
        bias_quant=Int32Bias,
        act_bit_width=5,
    )
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x)
    return model, quantized.eval()


def batches() -> list[Tensor]:
    return list(images()[0].split(64))


def pairs() -> list[tuple[Tensor, Tensor]]:
    x, y = images()
    return list(zip(x.split(64), y.split(64), strict=True))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
