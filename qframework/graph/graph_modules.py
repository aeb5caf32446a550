"""Models as graphs of modules alone: functions become modules, modules without parameters stand in one place each."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qframework.graph.graph_leaves import is_leaf
from qframework.graph.graph_pass import NoGraphError


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's and quantized layers."""
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def as_graph_module(model: nn.Module, who: str) -> fx.GraphModule:
    """A graph module with a model's own submodules; one is returned as it is.

    Raises:
        NoGraphError: it can't be traced.
    """
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever user code raises when it is traced
        raise NoGraphError(
            f"{who}: {type(model).__name__} can't be traced by torch.fx ({type(error).__name__}: {error}). "
            "layerwise_quantize and quantize_model do without a graph"
        ) from error
    made = fx.GraphModule(model, graph, type(model).__name__)
    made.train(model.training)
    return made


#: From functions and methods to what makes the module for their further arguments.
_MODULES: dict[Any, Callable[..., nn.Module]] = {
    torch.relu: lambda: nn.ReLU(),
    F.relu: lambda inplace=False: nn.ReLU(),
    "relu": lambda: nn.ReLU(),
    "relu_": lambda: nn.ReLU(),
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    torch.sigmoid: lambda: nn.Sigmoid(),
    F.sigmoid: lambda: nn.Sigmoid(),
    "sigmoid": lambda: nn.Sigmoid(),
    F.max_pool1d: lambda *a, **k: nn.MaxPool1d(*a, **k),
    F.max_pool2d: lambda *a, **k: nn.MaxPool2d(*a, **k),
    F.max_pool3d: lambda *a, **k: nn.MaxPool3d(*a, **k),
    F.avg_pool1d: lambda *a, **k: nn.AvgPool1d(*a, **k),
    F.avg_pool2d: lambda *a, **k: nn.AvgPool2d(*a, **k),
    F.avg_pool3d: lambda *a, **k: nn.AvgPool3d(*a, **k),
    F.adaptive_avg_pool1d: lambda output_size: nn.AdaptiveAvgPool1d(output_size),
    F.adaptive_avg_pool2d: lambda output_size: nn.AdaptiveAvgPool2d(output_size),
    F.adaptive_avg_pool3d: lambda output_size: nn.AdaptiveAvgPool3d(output_size),
    F.dropout: lambda p=0.5, training=True, inplace=False: nn.Dropout(p),
}
#: Modules that keep nothing between calls.
STATELESS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU,
    nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Identity, nn.Flatten,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def free_name(model: nn.Module, wanted: str) -> str:
    """A name that the model doesn't have yet."""
    name, i = wanted, 0
    while hasattr(model, name):
        i += 1
        name = f"{wanted}_{i}"
    return name


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    where, _, last = name.rpartition(".")
    setattr(model.get_submodule(where), last, module)


def functions_to_modules(model: fx.GraphModule) -> None:
    """Turn calls of functions that have a module into calls of one."""
    for node in list(model.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _MODULES:
            continue
        further = (*node.args[1:], *node.kwargs.values())
        if not node.args or any(isinstance(x, fx.Node) for x in further):
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k != "return_indices" or v}
        made = _MODULES[node.target](*node.args[1:], **kwargs)
        _call_instead(model, node, made.train(model.training))


def _call_instead(model: fx.GraphModule, node: fx.Node, module: nn.Module) -> fx.Node:
    name = free_name(model, node.name)
    model.add_submodule(name, module)
    with model.graph.inserting_after(node):
        call = model.graph.call_module(name, (node.args[0],))
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
    return call  # type: ignore[no-any-return]


def means_to_pools(model: fx.GraphModule) -> None:
    """Turn the mean over both axes of images into pooling, flattened where the axes go."""
    for node in list(model.graph.nodes):
        if node.target not in (torch.mean, "mean") or node.op == "call_module" or not node.args:
            continue
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        several = set(axes) if isinstance(axes, (tuple, list)) else {axes}
        if several not in ({2, 3}, {-1, -2}) or set(node.kwargs) - {"dim", "keepdim"}:
            continue
        call = _call_instead(model, node, nn.AdaptiveAvgPool2d((1, 1)))
        if not keep:
            with model.graph.inserting_after(call):
                flat = model.graph.call_function(torch.flatten, (call, 1))
            call.replace_all_uses_with(flat, delete_user_cb=partial(operator.is_not, flat))


def stand_alone(model: fx.GraphModule) -> None:
    """Give each call of a module without parameters a module of its own."""
    seen: set[str] = set()
    for node in model.graph.nodes:
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        if str(node.target) in seen and isinstance(module, STATELESS):
            name = free_name(model, str(node.target).replace(".", "_") + "_again")
            model.add_submodule(name, copy.deepcopy(module))
            node.target = name
        seen.add(str(node.target))


def without_dropout(model: fx.GraphModule) -> None:
    """Take dropout out, which does nothing in evaluation."""
    for node in list(model.graph.nodes):
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), DROPOUTS):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def relu6_to_relu(model: fx.GraphModule) -> None:
    """Take the upper bound of ReLU6 away, which a quantizer's range takes the place of."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.ReLU6:
            put_module(model, name, nn.ReLU().train(module.training))


def join_concatenations(model: fx.GraphModule) -> None:
    """Turn a concatenation that only another one along the same axis reads into its operands."""
    joins = (torch.cat, torch.concat, torch.concatenate)

    def axis(node: fx.Node) -> Any:
        return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)

    for node in model.graph.nodes:
        if node.target not in joins:
            continue
        operands: list[Any] = []
        for part in node.args[0]:
            inner = isinstance(part, fx.Node) and part.target in joins and len(part.users) == 1
            same = inner and axis(part) == axis(node)
            operands += list(part.args[0]) if same else [part]
        node.args = (operands, *node.args[1:])
    model.graph.eliminate_dead_code()


#: Functions and methods that add two tensors.
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
#: Functions that join tensors.
JOINS = (torch.cat, torch.concat, torch.concatenate)
