"""Recurrent layers beside the same cells in float, written as loops in Python: 40 steps, batch 16, 64 units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import medians
from qframework.graph import calibration_mode
from qframework.layers import QuantGRU, QuantLSTM

STEPS, BATCH, FEATURES, SIZE = 40, 16, 40, 64


class FloatLoop(nn.Module):
    """The cell of a torch layer, step by step.

    Args:
        layer: whose weights are taken.
    """

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.by_input, self.by_state, self.bias, self.state_bias = (
            nn.Parameter(getattr(layer, f"{name}_l0").detach().clone())
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        self.step = self.lstm if isinstance(layer, nn.LSTM) else self.gru

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step of an LSTM."""
        gates = nn.functional.linear(x, self.by_input, self.bias)
        gates = gates + nn.functional.linear(h, self.by_state)
        entering, forget, new, leaving = gates.chunk(4, dim=1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(entering) * torch.tanh(new)
        return torch.sigmoid(leaving) * torch.tanh(c), c

    def gru(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step of a GRU."""
        from_input = nn.functional.linear(x, self.by_input, self.bias).chunk(3, dim=1)
        from_state = nn.functional.linear(h, self.by_state, self.state_bias).chunk(3, dim=1)
        reset = torch.sigmoid(from_input[0] + from_state[0])
        update = torch.sigmoid(from_input[1] + from_state[1])
        new = torch.tanh(from_input[2] + reset * from_state[2])
        return new + update * (h - new), c

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all steps."""
        h = c = x.new_zeros(x.shape[1], self.by_state.shape[1])
        outputs = []
        for t in range(x.shape[0]):
            h, c = self.step(x[t], h, c)
            outputs.append(h)
        return torch.stack(outputs)


def _runs(model: Any, x: Tensor, training: bool) -> Callable[[], None]:
    model.train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        if training:
            model.zero_grad()
            out.sum().backward()

    return run


def measure(rounds: int, compiled: bool) -> dict[str, float]:
    """Ratios of the quantized layers to the loops, once scales are learned: of a sequence, and of a further step."""
    out = {}
    kinds: tuple[tuple[str, Any, Any], ...] = (
        ("lstm", QuantLSTM, nn.LSTM),
        ("gru", QuantGRU, nn.GRU),
    )
    for name, quantized, of_torch in kinds:
        models = FloatLoop(of_torch(FEATURES, SIZE)), quantized(FEATURES, SIZE)
        with calibration_mode(models[1]):
            models[1](torch.randn(STEPS, BATCH, FEATURES))
        for what, training in (("train", True), ("eval", False)):
            for prefix in ("", "compiled_") if compiled and name == "lstm" else ("",):
                whole, step = _ratios(models, training, rounds, prefix != "")
                out[f"{prefix}{name}_{what}"], out[f"{prefix}{name}_step_{what}"] = whole, step
    return out


def _ratios(models: Any, training: bool, rounds: int, compiled: bool) -> tuple[float, float]:
    """Of a sequence; and of one step, from the difference to a short sequence."""
    found = []
    for steps in (2, STEPS):
        used = models
        if compiled:
            torch.compiler.reset()
            used = [torch.compile(m, fullgraph=True) for m in models]
        first, second = (_runs(m, torch.randn(steps, BATCH, FEATURES), training) for m in used)
        found.append(medians(first, second, 3 * rounds))
    (short, quant_short), (plain, quant) = found
    return quant / plain, (quant - quant_short) / (plain - short)
