"""What is done around a quantizer: its input changed in place, the layer traced."""

import pytest
import torch

import qframework
from qframework.layers import QuantConv2d, QuantLinear, QuantReLU


@pytest.mark.parametrize("kernels", ["auto", "fused", "reference"])
@pytest.mark.parametrize("size", [8, 128])
@pytest.mark.parametrize("learned", [False, True])
def test_the_input_of_a_relu_may_be_changed_in_place(kernels, size, learned) -> None:
    def gradients(in_place: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        act = QuantReLU(collect_stats_steps=1)
        act(torch.randn(9))
        act.train(learned)
        if learned:
            act(torch.randn(9))
        w = torch.randn(8, 8, requires_grad=True)
        x = torch.randn(size, 8) @ w
        before = x.detach().clone()
        y = act(x)
        if in_place:
            x += y
        else:
            x = x + y
        (x.square().sum() + torch.nn.functional.linear(y, torch.randn(8, 8)).sum()).backward()
        assert torch.equal(x.detach(), before + y.detach())
        return [w.grad, act.act_quant.tensor_quant.scaling_impl.value.grad]

    with qframework.settings.use(kernels=kernels):
        for found, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_traced_network_passes_the_check_and_has_gradients(with_gradient) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        QuantConv2d(1, 4, 3), QuantReLU(bit_width=4), torch.nn.Flatten(), QuantLinear(144, 2)
    )
    x = torch.randn(2, 1, 8, 8)
    net(x)
    net.eval()
    with torch.set_grad_enabled(with_gradient):
        traced = torch.jit.trace(net, x)
        assert torch.equal(traced(x), net(x))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    traced(found).sum().backward()
    net(expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
