"""A number format that the library doesn't have, in one file: posits, and logarithmic numbers.

python examples/new_format.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qframework.core.base import CoreModule
from qframework.functional import round_ste
from qframework.inject import Injector, value
from qframework.layers import QuantLinear, QuantReLU
from qframework.proxy import WeightQuantProxyFromInjector
from qframework.quant_tensor import QuantTensor
from qframework.quantizers import CodebookActPerTensorFloat, CodebookWeightPerChannelFloat

# ------------------------------------------------------------------ by its numbers: a codebook


def posits(bits: int, exponent_bits: int) -> tuple[float, ...]:
    """All numbers of a posit format (Gustafson, 2017): sign, regime, exponent, fraction."""
    found = {0.0}
    for code in range(1, 2 ** (bits - 1)):
        text = format(code, f"0{bits - 1}b")
        run = len(text) - len(text.lstrip(text[0]))
        regime = run - 1 if text[0] == "1" else -run
        rest = text[run + 1 :]
        exponent = int(rest[:exponent_bits].ljust(exponent_bits, "0") or "0", 2)
        fraction = rest[exponent_bits:]
        significand = 1 + int(fraction or "0", 2) / 2 ** len(fraction)
        found.add(significand * 2.0 ** (regime * 2**exponent_bits + exponent))
    return tuple(sorted(found | {-v for v in found}))


class Posit(Injector):
    """6 bits, one of them for the exponent; both may be rebound."""

    bit_width = 6
    posit_exponent_bits = 1

    @value
    def codebook(bit_width, posit_exponent_bits):
        return posits(bit_width, posit_exponent_bits)


class PositWeight(Posit, CodebookWeightPerChannelFloat):
    """Posit weights, a scale per output channel."""


class PositAct(Posit, CodebookActPerTensorFloat):
    """Posit activations; the scale is collected, then learned."""

    collect_stats_steps = 20


# ------------------------------------------------------------------ by its arithmetic: a module of one's own


class LogarithmicQuantTensor(QuantTensor):
    """Numbers ``±2^(code / steps)`` in dequantized form; every function decays to floats."""

    def __init__(self, value: Tensor, steps: int) -> None:
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "steps", steps)

    rules = {}

    def codes(self) -> Tensor:
        """The logarithms, as integers; the sign is that of the value."""
        return torch.round(self.value.abs().log2() * self.steps).to(torch.int32)


class LogarithmicQuant(CoreModule):
    """``y = sign(x) 2^(clamp(round(n log2|x|), ...) / n)``, down to ``2^-octaves`` of the largest weight."""

    def __init__(self, log_steps: int, log_octaves: int) -> None:
        super().__init__()
        self.steps, self.octaves = log_steps, log_octaves

    def forward(self, x: Tensor) -> tuple[Tensor]:
        top = torch.ceil(x.detach().abs().amax().log2() * self.steps)
        code = round_ste(x.abs().clamp_min(1e-30).log2() * self.steps)
        code = torch.maximum(code, top - self.octaves * self.steps)
        return (torch.exp2(code / self.steps).copysign(x),)


class LogarithmicWeightProxy(WeightQuantProxyFromInjector):
    """Wraps what the module computes."""

    def _wrap(self, output, source, parameter):
        return LogarithmicQuantTensor(output[0], self.tensor_quant.steps)


class LogarithmicWeight(Injector):
    """A declaration binds module, proxy and settings."""

    tensor_quant = LogarithmicQuant
    proxy_class = LogarithmicWeightProxy
    log_steps = 1
    log_octaves = 7


# ------------------------------------------------------------------ both at work


def network(weight_quant, act_quant, **keywords) -> nn.Sequential:
    activation = {} if act_quant is None else {"act_quant": act_quant}
    return nn.Sequential(
        QuantLinear(64, 48, weight_quant=weight_quant, **keywords),
        QuantReLU(**activation),
        QuantLinear(48, 10, weight_quant=weight_quant, **keywords),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    print("posits of 6 bits above 0:", *posits(6, 1)[32:])
    for name, weight, act, keywords in (
        ("posits of 6 bits", PositWeight, PositAct, {}),
        ("posits of 4 bits", PositWeight, PositAct, {"weight_bit_width": 4}),
        ("logarithmic, 1 step an octave", LogarithmicWeight, None, {}),
        ("logarithmic, 4 steps an octave", LogarithmicWeight, None, {"weight_log_steps": 4}),
    ):
        torch.manual_seed(0)
        model = network(weight, act, **keywords)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
        quantized = model[0].quant_weight()
        print(f"{name}: {accuracy:.1%}; codes {quantized.codes()[0, :6].tolist()} ...")


if __name__ == "__main__":
    main()
