"""Post-training quantization in several processes, each with its own part of the data, gives what one process gives with all of it."""

import torch
from small_network import network, parts

from qframework.graph import bias_correction_mode, calibration_mode, norm_correction_mode, ptq
from qframework.graph import quantize_model as quantize
from qframework.graph.gpfq import gpfq
from qframework.graph.gptq import gptq
from qframework.graph.learned_round import learned_round
from qframework.graph.magr import magr
from qframework.graph.qronos import qronos
from qframework.quantizers import Int8ActPerTensorFloat

ALGORITHMS = {
    "gptq": gptq,
    "gpfq": gpfq,
    "qronos": qronos,
    "adaround": lambda m, b: learned_round(m, b, steps=8),
}


def solved(data: list[torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What all algorithms make of the network."""
    found = {}
    for name, algorithm in ALGORITHMS.items():
        model, _ = quantize(
            network(), weight_bit_width=4, input_quant=Int8ActPerTensorFloat, act_quant=None
        )
        model.eval()
        with torch.no_grad(), calibration_mode(model):
            for x in data:
                model(x)
        done = algorithm(model, data)
        with torch.no_grad(), bias_correction_mode(model, float_weights=done.float_weights):
            for x in data:
                model(x)
        found[name] = {n: t.detach() for n, t in model.state_dict().items()}
    net = network()
    magr(net, data, alpha=0.01)
    with torch.no_grad(), norm_correction_mode(net):
        for x in data:
            net(x)
    found["float"] = {n: t.detach() for n, t in net.state_dict().items()}
    return found


def in_parts(rank: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    return solved(parts()[rank::size])


def recipe_in_parts(rank: int, size: int) -> torch.Tensor:
    model, _ = ptq(network(), parts()[rank::size], "w4a8-gptq")
    return model(parts()[0]).detach()


def test_statistics_hessians_and_corrections_are_those_of_all_data(two) -> None:
    results = two(in_parts)
    alone = solved(parts())
    for name, state in alone.items():
        for key, tensor in state.items():
            if not tensor.is_floating_point() or key.endswith("num_batches_tracked"):
                continue
            for own in results:
                torch.testing.assert_close(own[name][key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=(name, key): f"{k}: {m}")  # fmt: skip


def test_a_recipe_gives_all_processes_the_same_model(two) -> None:
    one, other = two(recipe_in_parts)
    assert torch.equal(one, other)
    model, _ = ptq(network(), parts(), "w4a8-gptq")
    torch.testing.assert_close(one, model(parts()[0]).detach(), rtol=1e-5, atol=1e-5)
