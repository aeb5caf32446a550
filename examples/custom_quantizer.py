"""Quantizers of one's own: by keyword, by subclass, by a function of other names, from nothing.

python examples/custom_quantizer.py
"""

from __future__ import annotations

import torch

from qframework.core.binary import BinaryQuant
from qframework.core.scaling import ParameterScaling
from qframework.inject import Injector, QuantizerError, value
from qframework.layers import QuantConv2d, QuantLinear, QuantReLU
from qframework.proxy import WeightQuantProxyFromInjector
from qframework.quantizers import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

torch.manual_seed(0)

print("1. A keyword of the layer rebinds a name of its quantizer.\n")
layer = QuantLinear(16, 8, weight_bit_width=4, weight_scaling_per_output_type="channel")
print(layer, "\n")


print("2. A subclass says the same once and for all; mixins compose as Python's classes do.\n")


class FourBits(Int8WeightPerTensorFloat):
    """Bases and a changed value."""

    bit_width = 4


class PowersOfTwo(Int8WeightPerChannelFloat):
    """A scale per channel, restricted to powers of two."""

    restrict_scaling_type = "power_of_two"


class FourBitPowersOfTwo(FourBits, PowersOfTwo):
    """Both."""


conv = QuantConv2d(3, 8, 3, weight_quant=FourBitPowersOfTwo)
print(conv)
print("scales:", conv.weight_quant.scale().flatten().tolist()[:4], "\n")


print("3. @value computes a name from others, what the layer provides among them.\n")


class ThreeSigma(Int8WeightPerTensorFloat):
    """A learned scale that starts at three standard deviations of the layer's weight."""

    bit_width = 4
    scaling_impl_type = "parameter"

    @value
    def scaling_init(module):
        return 3 * module.weight.detach().std()


sigma = QuantLinear(64, 64, weight_quant=ThreeSigma)
print(f"scale {sigma.weight_quant.scale().item():.5f}, learned from here on")
torch.nn.init.normal_(sigma.weight, std=1.0)
sigma.weight_quant.init_tensor_quant()
print(f"scale {sigma.weight_quant.scale().item():.5f} after the weight was drawn anew\n")


print("4. From nothing: bind what a tensor quantizer needs.\n")


class LearnedBinary(Injector):
    """-s and s with a learned s."""

    tensor_quant = BinaryQuant
    scaling_impl = ParameterScaling
    scaling_init = 0.1
    proxy_class = WeightQuantProxyFromInjector
    signed = True


print("by hand:", LearnedBinary.tensor_quant(torch.tensor([-0.3, 0.2, 0.7]))[0].tolist())
print(
    "in a layer:", QuantLinear(4, 1, weight_quant=LearnedBinary).quant_weight().value.tolist(), "\n"
)


print("5. Every value says where it came from.\n")
print(layer.weight_quant.explain(), "\n")


print("6. A mistake is named, with the nearest right name.\n")
for mistake in ({"bit_widht": 4}, {"bit_width": 0}, {"scaling_impl_type": "constant"}):
    try:
        QuantReLU(**mistake)
    except QuantizerError as error:
        print(f"{type(error).__name__}: {error}\n")
