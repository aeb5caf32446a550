"""Which batch norms can be folded into the layer in front of them."""

from __future__ import annotations

import itertools

from torch import fx, nn

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip


def foldable_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """From a layer with weights to the batch norm that alone reads its result.

    Found by tracing the model; where it can't be traced, among neighbours in ``nn.Sequential``. Both have to be called
    once, and the norm has to have running statistics.
    """
    pairs = _traced(model)
    return _in_sequence(model) if pairs is None else pairs


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    return (
        type(layer) in _LAYERS
        and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        and norm.running_mean is not None
    )


def _traced(model: nn.Module) -> dict[nn.Module, nn.Module] | None:
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever user code raises when it is traced
        return None
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called = model.get_submodule(node.target)
            calls[called] = calls.get(called, 0) + 1
    pairs: dict[nn.Module, nn.Module] = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = (model.get_submodule(str(n.target)) for n in (before, node))
        if _fits(layer, norm) and calls[layer] == calls[norm] == 1:
            pairs[layer] = norm
    return pairs


def _in_sequence(model: nn.Module) -> dict[nn.Module, nn.Module]:
    places: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                places[child] = places.get(child, 0) + 1
    pairs: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            children = list(module)
            for layer, norm in itertools.pairwise(children):
                if _fits(layer, norm) and places[layer] == places[norm] == 1:
                    pairs[layer] = norm
    return pairs
