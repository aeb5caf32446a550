"""Parts of one's own in the style of the reference: modules under its JIT switch, views, losses, optimizers, helpers."""

from __future__ import annotations

import brevitas as bv
import brevitas.config
import torch
import torch.nn as nn
from brevitas import nn as qnn
from brevitas.core import bit_width as widths, function_wrapper
from brevitas.core.function_wrapper.shape import StatsInputViewShapeImpl
from brevitas.core.utils import SingleArgStatelessBuffer, StatelessBuffer
from brevitas.function import ops_ste
from brevitas.function.shape import over_output_channels
from brevitas.inject import BaseInjector as Injector, this, value
from brevitas.loss import WeightBitWidthWeightedBySize
from brevitas.nn.quant_layer import QuantNonLinearActLayer as QuantNLAL, QuantWeightBiasInputOutputLayer as QuantWBIOL
from brevitas.nn.utils import merge_bn, rename_state_dict_by_prefix
from brevitas.optim import SignSGD
from brevitas.optim.cailey_sgd import CaileySGD
from brevitas.quant import Int8WeightPerTensorFloat

brevitas.config.IGNORE_MISSING_KEYS = True


class HalfOfTheRange(bv.jit.ScriptModule):
    def __init__(self, fraction: float = 0.5) -> None:
        super().__init__()
        self.fraction = StatelessBuffer(torch.tensor(fraction))
        self.one = SingleArgStatelessBuffer(1.0)

    @bv.jit.script_method
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(over_output_channels(x))
        return rows.abs().max() * self.fraction() * self.one(x)


class HalfRange(Int8WeightPerTensorFloat):
    scaling_stats_impl = HalfOfTheRange
    scaling_stats_input_view_shape_impl = StatsInputViewShapeImpl.OVER_OUTPUT_CHANNELS
    float_to_int_impl = function_wrapper.FloorSte


class LearnedWidth(Int8WeightPerTensorFloat):
    bit_width_impl_type = widths.BitWidthImplType.PARAMETER
    bit_width = this.start
    start = 6


def use_functions():
    from brevitas.function.ops import max_int; import brevitas.function.ops_ste as ste
    assert ste.round_ste(torch.tensor(1.6)) == ops_ste.ceil_ste(torch.tensor(1.2)) == 2
    return max_int(True, False, torch.tensor(8.0))


torch.manual_seed(0)
layer = qnn.QuantLinear(6, 4, weight_quant=HalfRange)
layer(torch.randn(3, 6)).sum().backward()
assert torch.allclose(layer.weight_quant.scale(), layer.weight.abs().max() / 2 / 127)
assert isinstance(layer, QuantWBIOL) and isinstance(qnn.QuantReLU(), QuantNLAL)
assert use_functions() == 127 and issubclass(Int8WeightPerTensorFloat, Injector) and callable(value)

model = nn.Sequential(qnn.QuantLinear(6, 4, weight_quant=LearnedWidth), nn.ReLU(), qnn.QuantLinear(4, 2))
penalty = WeightBitWidthWeightedBySize(model)
optimizer = SignSGD(model.parameters(), lr=0.01)
model(torch.randn(3, 6)).sum().add(penalty.retrieve()).backward()
optimizer.step()
width = next(m for m in model.modules() if isinstance(m, widths.BitWidthParameter))
assert width.bit_width_base == 2 and not width.override_pretrained
assert torch.isclose(width.bit_width_offset, torch.tensor(3.99))

rotation = nn.Parameter(torch.eye(4))
turning = CaileySGD([rotation], lr=0.1, stiefel=True)
rotation.square().mul(torch.arange(16.0).view(4, 4)).sum().add(rotation[0, 1]).backward()
turning.step()
assert torch.allclose(rotation @ rotation.t(), torch.eye(4), atol=1e-5) and not torch.equal(rotation, torch.eye(4))

conv, bn = qnn.QuantConv2d(2, 3, 1), nn.BatchNorm2d(3)
bn(torch.randn(4, 2, 3, 3).repeat(1, 2, 1, 1)[:, :3])
merge_bn(conv, bn)
state = {"old.weight": 1, "bias": 2}
rename_state_dict_by_prefix("old.", "new.", state)
assert state == {"new.weight": 1, "bias": 2}

head = qnn.HadamardClassifier(6, 5)
assert head(torch.randn(2, 6)).shape == (2, 5) and list(head.state_dict()) == ["scale"]
