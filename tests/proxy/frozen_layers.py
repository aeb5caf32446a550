"""Layers to freeze, and ways to change them."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from qframework.graph import calibration_mode
from qframework.layers import QuantLinear
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
)

WEIGHTS = [
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8WeightPerTensorFloat,
    Int8WeightPerTensorFloat.let(scaling_impl_type="parameter_from_stats"),
    Int8WeightPerChannelFloatMSE,
    SignedBinaryWeightPerTensorConst,
]
NAMES = [w.__name__ + str(i) for i, w in enumerate(WEIGHTS)]


def full(weight=Int8WeightPerTensorFloat, bias=Int32Bias) -> tuple[QuantLinear, torch.Tensor]:
    """A layer with all quantizers, calibrated, in evaluation."""
    torch.manual_seed(0)
    layer = QuantLinear(
        4,
        3,
        weight_quant=weight,
        bias_quant=bias,
        input_quant=Int8ActPerTensorFloat,
        output_quant=ShiftedUint8ActPerTensorFloat,
    )
    x = torch.randn(6, 4)
    with calibration_mode(layer):
        layer(x)
    return layer.eval(), x


def proxies(model: nn.Module) -> list:
    return [m for m in model.modules() if getattr(m, "tensor_quant", None) is not None]


def trained(kind, largest: float = 1.0) -> nn.Module:
    layer = kind(collect_stats_steps=1)
    for _ in range(2):
        layer(torch.linspace(0, largest, 64))
    return layer.eval()


def optimizer_step(layer: QuantLinear) -> None:
    for parameter in (layer.weight, layer.bias):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([layer.weight, layer.bias], lr=0.5).step()


def view_written(layer: QuantLinear) -> None:
    layer.weight[1].fill_(2.0)


def assigned(layer: QuantLinear) -> None:
    layer.weight = nn.Parameter(torch.full((3, 4), 0.5))


def data_assigned(layer: QuantLinear) -> None:
    layer.weight.data = torch.full((3, 4), 0.5)


def _other_numbers(layer: QuantLinear) -> dict[str, torch.Tensor]:
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in layer.state_dict().items()}


def loaded(layer: QuantLinear) -> None:
    layer.load_state_dict(_other_numbers(layer))


def loaded_by_assignment(layer: QuantLinear) -> None:
    layer.load_state_dict(_other_numbers(layer), assign=True)


def vector(layer: QuantLinear) -> None:
    parameters = [layer.weight, layer.bias]
    changed = 2 * nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(changed, parameters)


def converted(layer: QuantLinear) -> None:
    layer.double()
    layer.float()
    layer.weight.mul_(2)


def another_mode(layer: QuantLinear) -> None:
    layer.train()
    layer.eval()
    layer.weight.data.mul_(2)


def another_quantizer(layer: QuantLinear) -> None:
    other = QuantLinear(4, 3, weight_bit_width=2).weight_quant.tensor_quant.eval()
    layer.weight_quant.tensor_quant = other


def another_proxy(layer: QuantLinear) -> None:
    layer.weight_quant = QuantLinear(4, 3, weight_bit_width=2).eval().weight_quant
    layer.weight_quant.tracked_module_list[0] = layer


def another_part(layer: QuantLinear) -> None:
    other = QuantLinear(4, 3, weight_bit_width=2).weight_quant.tensor_quant
    layer.weight_quant.tensor_quant.msb_clamp_bit_width_impl = other.msb_clamp_bit_width_impl


def a_method_assigned(layer: QuantLinear) -> None:
    quantizer = layer.weight_quant.tensor_quant
    forward = type(quantizer).forward
    quantizer.forward = lambda w: (lambda y, *rest: (y / 2, *rest))(*forward(quantizer, w))


def a_hook(layer: QuantLinear) -> None:
    layer.weight_quant.tensor_quant.register_forward_hook(
        lambda module, args, result: (result[0] / 2, *result[1:])
    )


def built_anew(layer: QuantLinear) -> None:
    layer.weight.data.mul_(2)
    layer.weight_quant.init_tensor_quant()


def parametrized(layer: QuantLinear) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())


def pruned(layer: QuantLinear) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def swapped(layer: QuantLinear) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.full((3, 4), 0.5)))
