"""Which batch norms can be folded into the layer in front of them, and what is left in their place."""

from __future__ import annotations

import itertools

from torch import Tensor, fx, nn

from qframework.graph.module_shells import shell_tree

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedBatchNorm(nn.Identity):
    """Stands for a batch norm that was folded into the layer in front.

    Args:
        behind_linear: the layer is linear, whose channels are those of the norm for inputs of two axes alone.
    """

    def __init__(self, behind_linear: bool) -> None:
        super().__init__()
        self.behind_linear = behind_linear

    def forward(self, input: Tensor) -> Tensor:
        """The input itself.

        Raises:
            ValueError: an input whose second axis, that of the norm's channels, isn't the layer's last one.
        """
        if self.behind_linear and input.dim() != 2:
            raise ValueError(
                f"a BatchNorm1d behind a linear layer was folded into it, which is exact for inputs (N, C); got shape "
                f"{tuple(input.shape)}, whose channels are along axis 1. Convert the model without fold_batch_norm"
            )
        return input


def foldable_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """From a layer with weights to the batch norm that alone reads its result.

    Found by tracing a copy of the model; where it can't be traced, among neighbours in ``nn.Sequential``. Both have to be
    called once, without hooks; nothing else may read their parameters; the norm has to have running statistics of as many
    channels.
    """
    pairs = _traced(model)
    return _in_sequence(model) if pairs is None else pairs


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    if type(layer) not in _LAYERS or type(norm) not in _NORMS or norm.running_mean is None:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm)):
        return False
    channels = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return bool(channels == norm.num_features)


def _traced(model: nn.Module) -> dict[nn.Module, nn.Module] | None:
    stands: dict[nn.Module, nn.Module] = {}
    shells = shell_tree(model, stands)  # a forward may leave traces on the module that it runs in
    original = {new: old for old, new in stands.items()}
    try:
        graph = fx.Tracer().trace(shells)
    except Exception:  # whatever user code raises when it is traced
        return None
    calls: dict[nn.Module, int] = {}
    read: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            called = shells.get_submodule(str(node.target))
            calls[called] = calls.get(called, 0) + 1
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])
    pairs: dict[nn.Module, nn.Module] = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if read & {str(before.target), str(node.target)}:
            continue
        layer, norm = (shells.get_submodule(str(n.target)) for n in (before, node))
        if _fits(layer, norm) and calls[layer] == calls[norm] == 1:
            pairs[original[layer]] = original[norm]
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
            for layer, norm in itertools.pairwise(module):
                if _fits(layer, norm) and places[layer] == places[norm] == 1:
                    pairs[layer] = norm
    return pairs
