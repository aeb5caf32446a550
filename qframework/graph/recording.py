"""The graph of a model as one forward pass shows it, for models that torch.fx can't trace."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from qframework.graph.graph_leaves import is_leaf
from qframework.graph.torch_transformers import PLAIN, without_fast_path
from qframework.graph.tracing import Traced, parameters_read

_OPERATORS = {
    "__add__": operator.add,
    "__radd__": operator.add,
    "__iadd__": operator.add,
    "__getitem__": operator.getitem,
}


class _Recorder(TorchFunctionMode):
    """Makes a node of each call of a function outside of leaves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.depth = 0
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._names = {id(p): n for n, p in [*model.named_parameters(), *model.named_buffers()]}
        self._module_names = {m: n for n, m in model.named_modules()}

    def know(self, value: Any, node: fx.Node) -> None:
        """Note which node makes a tensor, or tensors in a list."""
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
            self._alive.append(value)  # so that no other tensor gets its id
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                if isinstance(part, Tensor):
                    self.know(part, self.graph.call_function(operator.getitem, (node, i)))

    def _given(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = self._nodes.get(id(value))
            if node is None:
                node = self.graph.create_node("get_attr", self._names.get(id(value), "constant"))
                self.know(value, node)
            return node
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return (
                type(value)(map(self._given, value)) if type(value) in (tuple, list) else str(value)
            )
        if isinstance(value, dict):
            return {k: self._given(v) for k, v in value.items()}
        plain = (int, float, bool, str, type(None), torch.dtype, torch.device, slice)
        return value if isinstance(value, plain) else repr(value)

    def called(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Make a node of a leaf's call."""
        name = self._module_names[module]
        self.modules[name] = module
        node = self.graph.create_node(
            "call_module", name, tuple(map(self._given, args)), self._given(dict(kwargs))
        )
        self.know(output, node)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and make a node of it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = isinstance(output, (Tensor, tuple, list)) and not isinstance(output, torch.Size)
        if self.depth == 0 and tensors:
            given, named = tuple(map(self._given, args)), self._given(dict(kwargs))
            if name == "__get__":  # of x.T, x.data, ...
                attribute = getattr(func.__self__, "__name__", "")
                node = self.graph.call_function(getattr, (given[0], attribute))
            elif name in _OPERATORS:
                node = self.graph.call_function(_OPERATORS[name], given, named)
            elif getattr(Tensor, name, None) is func:
                node = self.graph.call_method(name, given, named)
            else:
                node = self.graph.call_function(func, given, named)
            self.know(output, node)
        return output


@torch.no_grad()
def record(model: nn.Module, example_input: tuple[Any, ...]) -> Traced:
    """A model's graph, from one run in evaluation mode; what depends on the numbers is as it was in that run.

    Args:
        model: any module.
        example_input: its arguments.
    """
    recorder = _Recorder(model)
    handles: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        recorder.depth += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.depth -= 1
        if recorder.depth == 0:
            recorder.called(module, args, kwargs, output)

    tracer = fx.Tracer()
    training = [(m, m.training) for m in model.modules()]
    for i, value in enumerate(example_input):
        node = recorder.graph.placeholder(f"input_{i}")
        recorder.know(value, node)
    try:
        model.eval()
        for name, module in model.named_modules():
            hooked = module._forward_hooks or module._forward_pre_hooks
            leaf = tracer.is_leaf_module(module, name) or is_leaf(module)
            if module is not model and leaf and type(module) not in PLAIN:
                if not hooked:
                    handles.append(module.register_forward_pre_hook(enter))
                    handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with without_fast_path(), recorder:
            output = model(*example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    recorder.depth = 0
    values = output.values() if isinstance(output, dict) else output
    if not isinstance(values, (Tensor, tuple, list)):
        values = [v for v in values if isinstance(v, Tensor)]
    recorder.graph.output(recorder._given(values))
    read = parameters_read(recorder.graph, model)
    return Traced(recorder.graph, recorder.modules, {}, read)
