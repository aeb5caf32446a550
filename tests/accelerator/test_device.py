"""Where there is an accelerator: the numbers of the CPU, in training, evaluation and compiled; skipped elsewhere."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qframework
from qframework import quantizers as q
from qframework.graph import calibration_mode
from qframework.layers import (
    QuantConv2d,
    QuantGRU,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantReLU,
    QuantTransformerEncoderLayer,
)
from qframework.quant_tensor import QuantTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "quantizers"))
from test_contract import contract, predefined

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
if DEVICE is None:
    pytest.skip("there is no accelerator", allow_module_level=True)

CONTRACTS = {name: contract(name)() for name in predefined()}
BY_ROLE = [n for n, c in CONTRACTS.items() if c.role() in ("weight", "activation")]


def plain(out: Any) -> Tensor:
    """On the CPU."""
    return (out.value if isinstance(out, QuantTensor) else out).detach().cpu()


def assert_same_codes(found: Tensor, expected: Tensor) -> None:
    """Equal, but for what a last bit of a scale changes."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["auto", "fused", "reference"])
@pytest.mark.parametrize("name", BY_ROLE)
def test_a_quantizer_gives_the_numbers_of_the_cpu(name: str, kernels: str) -> None:
    here = CONTRACTS[name].ready()
    there = copy.deepcopy(here).to(DEVICE)
    x = CONTRACTS[name].sample()
    with qframework.settings.use(kernels=kernels), torch.no_grad():
        if CONTRACTS[name].role() == "weight":
            expected = here.quant_weight(here.input_quant(x))
            found = there.quant_weight(there.input_quant(x.to(DEVICE)))
        else:
            expected, found = here(x), there(x.to(DEVICE))
    assert (found.value if isinstance(found, QuantTensor) else found).device.type == DEVICE.type
    if (
        "AccumulatorAware" in name
    ):  # its scale is a sum, whose order differs: one code in a hundred at a tie
        assert ((plain(found) - plain(expected)).abs() > 1e-6).float().mean() < 0.02
        return
    assert_same_codes(plain(found), plain(expected))
    for part in ("scale", "zero_point"):
        if isinstance(getattr(expected, part, None), Tensor):
            assert getattr(found, part).device.type == DEVICE.type
            assert_same_codes(getattr(found, part).detach().cpu(), getattr(expected, part).detach())


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", BY_ROLE)
def test_a_quantizer_trains_there_as_on_the_cpu(name: str, kernels: str) -> None:
    here = CONTRACTS[name].layer()
    there = copy.deepcopy(here).to(DEVICE)
    x = CONTRACTS[name].sample()
    gradients = []
    with qframework.settings.use(kernels=kernels):
        for layer, device in ((here, "cpu"), (there, DEVICE)):
            for step in range(3):
                layer.zero_grad()
                given = (x * (1 + step)).to(device).requires_grad_()
                out = layer(given)
                out = out.value if isinstance(out, QuantTensor) else out
                (
                    out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
                ).sum().backward()
            own = [p.grad.cpu() for p in layer.parameters() if p.grad is not None]
            gradients.append([given.grad.cpu(), *own])
    assert len(gradients[0]) == len(gradients[1])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()) + 1e-5
        )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        QuantIdentity(),
        QuantConv2d(3, 16, 3, padding=1, weight_bit_width=4, bias=False),
        nn.BatchNorm2d(16),
        QuantReLU(bit_width=4, return_quant_tensor=True),
        QuantConv2d(
            16, 16, 3, groups=16, weight_quant=q.Int8WeightPerChannelFloat, bias_quant=q.Int32Bias
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        QuantLinear(16, 10, weight_quant=q.MXFloat8e4m3Weight),
    )


def data(device: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(16, 3, 12, 12, generator=generator).to(device),
        torch.randint(0, 10, (16,), generator=generator).to(device),
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_network_learns_there_under_autocast(dtype: torch.dtype | None) -> None:
    model, (x, y) = network().to(DEVICE), data(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_steps_wait_for_nothing_on_the_host() -> None:
    """No transfer and no synchronization in a step: ``.item()`` and the like raise."""
    model, (x, y) = network().to(DEVICE), data(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    with calibration_mode(model), torch.no_grad():
        model(x)  # what collects asks the host in each step how often it did
    step()
    if DEVICE.type == "cuda":
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            model.eval()
            with torch.no_grad():
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


WEIGHTS = [
    q.Int8WeightPerTensorFloat,
    q.Int8WeightPerChannelFloat,
    q.Fp8e4m3OCPWeightPerTensorFloat,
    q.MXFloat8e4m3Weight,
]


@pytest.mark.slow
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_quantized_in_a_graph_there_are_those_of_eager_mode_there(weight: Any) -> None:
    """Without a product or a quantizer behind: what differs here differs by the quantizer alone."""
    torch.manual_seed(0)
    layer = QuantLinear(64, 64, weight_quant=weight).to(DEVICE)
    found = torch.compile(lambda: plain(layer.quant_weight()), fullgraph=True)()
    expected = plain(layer.quant_weight())
    # Triton divides to two units in the last place: a number at a tie may go the other way.
    differing = (found - expected).abs() > 1e-6 * expected.abs()
    assert differing.sum() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("weight", WEIGHTS)
def test_compiled_there_is_eager_there(weight: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantLinear(64, 64, weight_quant=weight, input_quant=q.Int8ActPerTensorFloat),
        QuantReLU(),
        QuantLinear(64, 8),
    ).to(DEVICE)
    x = torch.randn(32, 64, device=DEVICE)
    with calibration_mode(model), torch.no_grad():
        model(x)
    model.eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.train()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()) + 1e-5)


@pytest.mark.parametrize("make", [QuantLSTM, QuantGRU])
def test_recurrent_layers_give_the_numbers_of_the_cpu(make: Any) -> None:
    torch.manual_seed(0)
    here = make(8, 16, num_layers=2, bidirectional=True)
    x = torch.randn(6, 4, 8)
    for _ in range(3):
        here(x)
    here.eval()
    there = copy.deepcopy(here).to(DEVICE)
    with torch.no_grad():
        expected, found = plain(here(x)[0]), plain(there(x.to(DEVICE))[0])
    differing = (found - expected).abs() > 1e-4
    assert differing.float().mean() < 0.01  # a step of a code where sigmoids differ in a last bit


def test_attention_gives_the_numbers_of_the_cpu() -> None:
    torch.manual_seed(0)
    here = QuantTransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(4, 10, 32)
    for _ in range(3):
        here(x)
    here.eval()
    there = copy.deepcopy(here).to(DEVICE)
    with torch.no_grad():
        expected, found = plain(here(x)), plain(there(x.to(DEVICE)))
    assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_frozen_weights_thaw_there_as_on_the_cpu() -> None:
    layer, x = QuantLinear(16, 16).to(DEVICE).eval(), torch.randn(2, 16, device=DEVICE)
    with torch.no_grad(), qframework.frozen(layer):
        before = layer(x)
        layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)
        moved = layer.cpu()(x.cpu())
    torch.testing.assert_close(moved, layer(x.cpu()))


def test_integers_of_products_are_exact_there() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(
        64,
        32,
        bias=False,
        input_quant=q.Int8ActPerTensorFloat,
        weight_bit_width=4,
        return_quant_tensor=True,
    ).to(DEVICE)
    x = torch.randn(8, 64, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.eval()
        out, given, weight = layer(x), layer.input_quant(x), layer.quant_weight()
    exact = given.int().cpu().long() @ weight.int().cpu().long().t()
    assert torch.equal(out.int().cpu().long(), exact)


def test_a_checkpoint_of_the_cpu_loads_there() -> None:
    model = network()
    model(data("cpu")[0])
    there = network().to(DEVICE)
    there.load_state_dict(model.state_dict())
    model.eval(), there.eval()
    with torch.no_grad():
        expected, found = model(data("cpu")[0]), there(data(DEVICE)[0])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
