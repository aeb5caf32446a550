"""From a float network to 8, 4 and 2 bits on real data: scikit-learn's handwritten digits.

Trains a small convolutional network in float, carries its weights over into quantized networks, calibrates their
activations, trains them on, saves and reloads them, prints and plots what came out, and exports the network of 4 bits:
integers, torch's own programs, ONNX and QONNX compute the same.

    python examples/quickstart.py [--epochs 12] [--output demo_output]
"""

from __future__ import annotations

import argparse
import math
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import qframework
from qframework.export import load_quantized, save_quantized, verify
from qframework.graph import calibration_mode
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import Int8WeightPerChannelFloat

CONSOLE = Console()


class FloatNet(nn.Module):
    """Two convolutions and a classifier for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_input = nn.Identity()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits for images of shape (N, 1, 8, 8)."""
        x = self.relu1(self.bn1(self.conv1(self.quant_input(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class QuantNet(FloatNet):
    """The same network with `bits`-bit weights and activations; the image keeps 8."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        weights = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits}
        self.quant_input = QuantIdentity(bit_width=8)
        self.conv1 = QuantConv2d(1, 16, 3, padding=1, **weights)
        self.relu1 = QuantReLU(bit_width=bits)
        self.conv2 = QuantConv2d(16, 32, 3, padding=1, **weights)
        self.relu2 = QuantReLU(bit_width=bits)
        self.fc = QuantLinear(32 * 4 * 4, 10, **weights)


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels in [0, 1], a quarter of them for testing."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.tensor(a) for a in split)
    return x.float().view(-1, 1, 8, 8), y, x_test.float().view(-1, 1, 8, 8), y_test


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, name: str, progress: Progress
) -> None:
    """Adam with a cosine schedule, batches of 64."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    task = progress.add_task(name, total=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of images that are recognized."""
    right = 0
    with qframework.frozen(model.eval()), torch.no_grad():  # weights are quantized once
        for images, labels in zip(x.split(128), y.split(128), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return 100.0 * right / len(y)


def size_on_disk(path: Path) -> str:
    """Of a file; of the files in a folder, the tensors first, then what they are."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return " + ".join(f"{p.stat().st_size / 1024:.1f}" for p in files) + " KiB"


def interval(percent: float, images: int) -> tuple[float, float]:
    """Below and above a share of images: the 95 % interval of Wilson, in percent."""
    share, z = percent / 100, 1.96
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    half /= 1 + z * z / images
    return max(0.0, percent - 100 * (middle - half)), max(0.0, 100 * (middle + half) - percent)


def quantize(float_net: FloatNet, bits: int, x: Tensor) -> QuantNet:
    """A quantized network with the float weights, its activations calibrated on some of the data."""
    model = QuantNet(bits)
    model.load_state_dict(float_net.state_dict())
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        for batch in x[:512].split(64):
            model(batch)
    return model


def plot(nets: dict[int, QuantNet], results: dict[int, float], images: int, path: Path) -> None:
    """Float against quantized weights on their grid, and accuracy against bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(nets) + 1, figsize=(4.2 * (len(nets) + 1), 4))
    for axis, (bits, net) in zip(axes, nets.items(), strict=False):
        channel = net.conv2.weight.detach()[0].flatten()
        quantized = net.conv2.quant_weight()
        scale = quantized.scale.flatten()[0].item()
        top = 2 ** (bits - 1) - 1
        if bits <= 4:
            for level in range(-top, top + 1):
                axis.axhline(level * scale, color="0.85", linewidth=0.8, zorder=0)
        axis.plot(channel, quantized.value.detach()[0].flatten(), ".", markersize=4)
        axis.set(
            title=f"{bits} bits: conv2, channel 0", xlabel="float weight", ylabel="quantized weight"
        )
    places, heights = range(len(results)), list(results.values())
    errors = list(zip(*(interval(h, images) for h in heights), strict=True))
    axes[-1].bar(places, heights, color="#9fbbdc", width=0.6)
    axes[-1].errorbar(places, heights, yerr=errors, fmt="none", ecolor="0.25", capsize=5)
    for place, height in zip(places, heights, strict=True):
        axes[-1].text(place, 4, f"{height:.1f} %", ha="center", fontsize=9)
    axes[-1].set_xticks(places, ["float", *(f"{b} bits" for b in nets)])
    axes[-1].set(
        title=f"accuracy on {images} unseen digits\n(with 95 % intervals)",
        ylabel="percent",
        ylim=(0, 105),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def export(model: QuantNet, images: Tensor, path: Path) -> None:
    """Write the network for other runtimes, and prove layer by layer that they compute its integers."""
    if find_spec("onnx") is not None and find_spec("onnxscript") is not None:
        from qframework.export import export_onnx_qcdq

        batch = torch.export.Dim.DYNAMIC
        export_onnx_qcdq(model, (images,), path, opset_version=21, dynamic_shapes=({0: batch},))
        CONSOLE.print(
            f"{path} has {path.stat().st_size / 1024:.1f} KiB, weights of 4 bits each.",
            highlight=False,
        )
    CONSOLE.print(f"Its integers, in each target:\n{verify(model, images)}", highlight=False)


def main() -> None:
    """Run the whole road."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=12, help="epochs of each training (default 12)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for checkpoints and plot"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    start = time.perf_counter()
    x, y, x_test, y_test = load_data()
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    table = Table(title=f"Handwritten digits, {len(y_test)} unseen images")
    for heading in ("weights", "activations", "calibrated", "trained", "files on disk", "reloaded"):
        table.add_column(heading, justify="right")
    results: dict[int, float] = {}
    nets: dict[int, QuantNet] = {}
    with Progress(*columns, console=CONSOLE) as progress:
        float_net = FloatNet()
        train(float_net, x, y, options.epochs, 3e-3, "float", progress)
        results[32] = accuracy(float_net, x_test, y_test)
        path = options.output / "digits_float.safetensors"
        save_model(float_net, str(path))
        trained = f"{results[32]:.1f} %"
        table.add_row("float32", "float32", "", trained, size_on_disk(path), "")
        for bits in (8, 4, 2):
            net = quantize(float_net, bits, x)
            calibrated = accuracy(net, x_test, y_test)
            train(net, x, y, options.epochs, 1e-3 if bits > 2 else 3e-3, f"{bits} bits", progress)
            nets[bits], results[bits] = net, accuracy(net, x_test, y_test)
            path = options.output / f"digits_{bits}bit"
            save_quantized(net, path)  # weights packed to their bits
            reloaded = accuracy(load_quantized(path, FloatNet()), x_test, y_test)
            assert reloaded == results[bits], "a checkpoint must give back the same network"
            table.add_row(
                f"{bits} bits",
                f"{bits} bits",
                f"{calibrated:.1f} %",
                f"{results[bits]:.1f} %",
                size_on_disk(path),
                f"{reloaded:.1f} %",
            )
    CONSOLE.print(table)
    plot_path = options.output / "quickstart.png"
    plot(nets, results, len(y_test), plot_path)
    CONSOLE.print(f"One of the layers:\n{nets[4].conv2}", highlight=False)
    export(nets[4], x_test[:256], options.output / "digits_4bit.onnx")
    CONSOLE.print(
        f"Checkpoints and plot are in {options.output}/ ({time.perf_counter() - start:.0f} s)."
    )


if __name__ == "__main__":
    main()
