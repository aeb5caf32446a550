import pytest
import torch

import qframework
from qframework.inject import value
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU, QuantSigmoid
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat


def pair(**options) -> tuple[QuantLinear, QuantLinear]:
    first = QuantLinear(4, 5, **options)
    second = QuantLinear(6, 5, weight_quant=first.weight_quant)
    return first, second


@pytest.mark.parametrize("scaling", ["stats", "parameter_from_stats"])
def test_one_scale_over_the_weights_of_all(scaling) -> None:
    first, second = pair(weight_scaling_impl_type=scaling)
    with torch.no_grad():
        second.weight.mul_(10)
    assert first.weight_quant is second.weight_quant
    expected = torch.cat([first.weight.flatten(), second.weight.flatten()]).abs().max() / 127
    assert first.quant_weight().scale.item() == pytest.approx(expected.item())
    assert torch.equal(first.quant_weight().scale, second.quant_weight().scale)


def test_per_channel_scales_need_as_many_channels() -> None:
    first = QuantLinear(4, 5, weight_quant=Int8WeightPerChannelFloat)
    second = QuantLinear(6, 5, weight_quant=first.weight_quant)
    both = torch.cat([first.weight, second.weight], 1)
    torch.testing.assert_close(first.quant_weight().scale, both.abs().amax(1, keepdim=True) / 127)
    with pytest.raises(ValueError, match="5 scales, one a channel; this layer has 3"):
        QuantLinear(4, 3, weight_quant=first.weight_quant)
    assert len(first.weight_quant.tracked_module_list) == 2


def test_a_value_function_sees_all_layers() -> None:
    class Largest(Int8WeightPerTensorFloat):
        scaling_impl_type = "parameter"

        @value
        def scaling_init(module):
            modules = module if isinstance(module, tuple) else (module,)
            return max(m.weight.detach().abs().max() for m in modules)

    first = QuantLinear(4, 4, weight_quant=Largest)
    second = QuantLinear(4, 4)
    with torch.no_grad():
        second.weight.mul_(10)
    first.weight_quant.add_tracked_module(second)
    assert first.weight_quant.scale().item() == pytest.approx(
        second.weight.abs().max().item() / 127
    )


def test_sharing_keeps_what_was_trained() -> None:
    first = QuantLinear(4, 5, weight_scaling_impl_type="parameter_from_stats")
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    first(torch.randn(3, 4)).pow(2).sum().backward()
    optimizer.step()
    trained, parameter = (
        first.weight_quant.scale().item(),
        first.weight_quant.tensor_quant.scaling_impl.value,
    )
    QuantLinear(6, 5, weight_quant=first.weight_quant)
    assert first.weight_quant.scale().item() == trained
    assert first.weight_quant.tensor_quant.scaling_impl.value is parameter


def test_sharing_keeps_a_calibration() -> None:
    first = QuantReLU(collect_stats_steps=1)
    for _ in range(3):
        first(torch.tensor([12.75]))
    second = QuantIdentity(act_quant=first.act_quant, return_quant_tensor=True)
    assert second.act_quant.scale().item() == pytest.approx(0.05)


def test_layers_that_share_a_quantizer_can_be_added_in_evaluation() -> None:
    first = QuantIdentity(return_quant_tensor=True)
    second = QuantIdentity(act_quant=first.act_quant, return_quant_tensor=True)
    first(torch.randn(9))
    second(torch.randn(9))
    first.eval()
    second.eval()
    total = first(torch.randn(9)) + second(torch.randn(9))
    assert isinstance(total, IntQuantTensor)
    assert total.is_valid
    assert total.bit_width.item() == 9


def test_anything_else_than_a_proxy_of_the_same_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="can't share a ActQuantProxyFromInjector"):
        QuantLinear(4, 4, weight_quant=QuantReLU().act_quant)


def test_a_layer_that_shares_a_quantizer_keeps_its_own_function() -> None:
    first = QuantIdentity()
    second = QuantReLU(act_quant=first.act_quant)
    x = torch.tensor([-1.0, 0.5, 1.0])
    assert first(x)[0] < 0
    assert second(x)[0] == 0


def test_a_quantizer_that_comes_with_another_function_is_not_shared() -> None:
    with pytest.raises(TypeError, match="applies Sigmoid first"):
        QuantIdentity(act_quant=QuantSigmoid().act_quant)
    QuantSigmoid(act_quant=QuantSigmoid().act_quant)


@pytest.mark.parametrize("half", [False, True])
def test_a_scale_for_several_weights_follows_the_largest_of_all(
    half,
) -> None:
    torch.manual_seed(0)
    first = QuantLinear(4, 3, bias=False)
    second = QuantConv2d(2, 3, 2, bias=False, weight_quant=first.weight_quant)
    with torch.no_grad():
        second.weight[0, 0, 0, 0] = -7.0
        first.weight[0, 0] = 7.0  # a tie between the two
    if half:
        second.half()
    found = []
    for kernels in ("fused", "reference"):
        with qframework.settings.use(kernels=kernels):
            weights = first.quant_weight(), second.quant_weight()
            assert all(w.scale.item() == pytest.approx(7 / 127) for w in weights)
            loss = weights[0].value.square().sum() + 3 * weights[1].value.float().sum()
            found.append(torch.autograd.grad(loss, [first.weight, second.weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3 if half else 1e-5)
