"""Which batch norms can be folded into the layer in front of them, and what is left in their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from qframework.graph.parameters_in_use import readers_in_code
from qframework.graph.tracing import Traced, trace

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Tells which torch layer a module computes the same as; None for none.
BaseOf = Callable[[nn.Module], type[nn.Module] | None]


class FoldedBatchNorm(nn.Identity):
    """Stands for a batch norm that was folded into the layer in front.

    Args:
        behind_linear: the layer is linear, whose channels are those of the norm for inputs of two axes alone.
        then: names of the children that are applied to the norm's result, which the owner adds.
    """

    def __init__(self, behind_linear: bool, then: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.behind_linear, self.then = behind_linear, then

    def forward(self, input: Tensor) -> Tensor:
        """The input itself, or what the children make of it.

        Raises:
            ValueError: an input whose second axis, that of the norm's channels, isn't the layer's last one.
        """
        if self.behind_linear and input.dim() != 2:
            raise ValueError(
                f"a BatchNorm1d behind a linear layer was folded into it, which is exact for inputs (N, C); got shape "
                f"{tuple(input.shape)}, whose channels are along axis 1. Convert the model without fold_batch_norm"
            )
        for name in self.then:
            input = self._modules[name](input)  # type: ignore[misc]
        return input


@dataclass
class Foldable:
    """What can be folded.

    Attributes:
        pairs: from a layer with weights to the batch norm that alone reads its result.
        then: for a norm that does more than normalize, names of its children that do it, in order.
        reasons: for the other norms, why not.
    """

    pairs: dict[nn.Module, nn.Module] = field(default_factory=dict)
    then: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def foldable(model: nn.Module, traced: Traced | str, base_of: BaseOf) -> Foldable:
    """Which layers and batch norms go together.

    Found in the traced model; where it can't be traced, among neighbours in ``nn.Sequential``. Both have to be
    called once, without hooks; nothing else may read their parameters; the norm has to have running statistics of as many
    channels.

    Args:
        model: the float model.
        traced: its graph, or why there is none.
        base_of: which torch layer a module computes the same as.
    """
    found = Foldable()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if type(norm) in _NORMS:
            found.then[norm] = ()
        else:
            then = children_behind(norm)
            if then is None:
                found.reasons[norm] = (
                    f"a {type(norm).__name__} may compute otherwise than a batch norm"
                )
            else:
                found.then[norm] = then
    if isinstance(traced, str):
        _in_sequence(model, found, base_of, traced)
    else:
        _in_graph(traced, found, base_of)
    for norm in norms:
        if not any(norm is n for n in found.pairs.values()):
            found.reasons.setdefault(norm, "the model doesn't call it")
    return found


def children_behind(norm: Any) -> tuple[str, ...] | None:
    """Names of the children that a class of its own calls after normalizing; None where it does anything else."""
    traced = trace(norm, own=True, prepare=lambda m: m.eval())
    if isinstance(traced, str) or norm.running_mean is None:
        return None
    nodes = list(traced.graph.nodes)
    names: list[str] = []
    node = nodes[-1].args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1:
        names.append(str(node.target))
        node = node.args[0]
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(node, fx.Node) or node.target is not F.batch_norm:
        return None
    order = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    given = dict(zip(order, node.args, strict=False)) | dict(node.kwargs)
    read = {
        n: getattr(given.get(n), "target", None)
        for n in ("running_mean", "running_var", "weight", "bias")
    }
    present = {n: n for n in read if getattr(norm, n) is not None}
    right = {n: t for n, t in read.items() if t is not None} == present
    if (
        not right
        or given["input"] is not inputs[0]
        or given.get("training")
        or given.get("eps") != norm.eps
    ):
        return None
    return tuple(reversed(names))


def _hindrance(layer: nn.Module, norm: Any, base_of: BaseOf) -> str | None:
    """Why a norm can't be folded into the layer in front of it, from what the two are."""
    if base_of(layer) not in _LAYERS:
        return f"behind a {type(layer).__name__}, which has no weight to fold into"
    if norm.running_mean is None:
        return "it has no running statistics"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm)):
        return "it or the layer in front has hooks"
    channels = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    if channels != norm.num_features:
        return f"the layer in front has {channels} channels, the norm {norm.num_features}"
    return None


def _in_graph(traced: Traced, found: Foldable, base_of: BaseOf) -> None:
    calls: dict[nn.Module, int] = {}
    read: set[str] = set()
    in_code = readers_in_code(traced)
    for node in traced.graph.nodes:
        called = traced.called(node)
        if called is not None:
            calls[called] = calls.get(called, 0) + 1
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])
    for node in traced.graph.nodes:
        norm = traced.called(node)
        if norm is None or norm not in found.then:
            continue
        before = node.args[0] if len(node.args) == 1 else None
        layer = traced.called(before)
        if layer is None or not isinstance(before, fx.Node):
            behind = getattr(before, "name", "its input")
            reason: str | None = f"behind {behind}, which is no layer"
        else:
            reason = _hindrance(layer, norm, base_of)
            if reason is None and len(before.users) != 1:
                reason = "others read the result of the layer in front too"
            elif reason is None and (
                read & {str(before.target), str(node.target)} or {layer, norm} & in_code
            ):
                reason = "others read its parameters, or those of the layer in front"
            elif reason is None and not calls[layer] == calls[norm] == 1:
                reason = "it or the layer in front is called several times"
        if reason is None and layer is not None:
            found.pairs[layer] = norm
        else:
            found.reasons[norm] = reason or ""


def _in_sequence(model: nn.Module, found: Foldable, base_of: BaseOf, why: str) -> None:
    places: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                places[child] = places.get(child, 0) + 1
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for layer, norm in itertools.pairwise(module):
                if norm in found.then:
                    reason = _hindrance(layer, norm, base_of)
                    if places[layer] == places[norm] == 1 and reason is None:
                        found.pairs[layer] = norm
                    else:
                        found.reasons[norm] = (
                            reason or "it or the layer in front stands in several places"
                        )
    for norm in found.then:
        if not any(norm is n for n in found.pairs.values()):
            found.reasons.setdefault(
                norm, f"the model can't be traced ({why}), and it isn't in an nn.Sequential"
            )
