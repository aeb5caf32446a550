"""Running a model node by node, all batches through one node before the next: each layer is met once, with all of its inputs.

Only what later nodes read is kept, so there are the activations of one place in the model, not those of all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from qframework.graph.batches import Batches
from qframework.graph.graph_leaves import is_leaf
from qframework.graph.layer_inputs import Call, Reached, watching
from qframework.graph.quantizers_off import quantizers_off, with_weights
from qframework.graph.tracing import Traced, trace


class Stream:
    """One way through the model: as it is quantized, or as the float model.

    Args:
        count: number of batches.
        quantized: whether quantizers work.
        activations: whether those of activations do, in the quantized one.
        offload: keep what is between nodes on the CPU.
    """

    def __init__(self, count: int, quantized: bool, activations: bool, offload: bool) -> None:
        self.values: list[dict[fx.Node, Any]] = [{} for _ in range(count)]
        self.quantized, self.activations, self.offload = quantized, activations, offload

    @contextmanager
    def set_up(self, module: nn.Module, originals: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let a module compute as the stream has it."""
        with ExitStack() as stack:
            if not self.quantized:
                own = set(module.parameters())
                held = {p: w for p, w in originals.items() if p in own}
                stack.enter_context(quantizers_off(module))
                stack.enter_context(with_weights(held))
            elif not self.activations:
                stack.enter_context(quantizers_off(module, weights=False, biases=False))
            yield

    def call(self, node: fx.Node, batch: int, device: Any = None) -> Call:
        """The arguments of a node's call."""
        held = self.values[batch]

        def given(n: fx.Node) -> Any:
            value = held[n]
            return _moved(value, device) if self.offload and device is not None else value

        args = fx.node.map_arg(node.args, given)
        kwargs = fx.node.map_arg(node.kwargs, given)
        return Call(tuple(args), dict(kwargs))  # type: ignore[arg-type, call-overload]

    def keep(self, node: fx.Node, batch: int, value: Any) -> None:
        """Keep a node's result for a batch."""
        self.values[batch][node] = _moved(value, "cpu") if self.offload else value


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


#: Called with a node's module before it runs: the module, and its calls in each stream.
Visit = Callable[[nn.Module, list[list[Call]]], None]


class NodeExecution:
    """Runs a traced model.

    Args:
        model: in evaluation mode.
        traced: its graph.
        batches: at once in memory.
        with_float: run the float stream beside the quantized one.
        use_quant_activations: whether activations are quantized.
        offload: keep what is between nodes on the CPU.

    Attributes:
        originals: float contents of parameters that were changed, for the float stream.
        look: called with each node that calls something, and its arguments in the first stream, before it runs.
    """

    look: Callable[[fx.Node, Call], object] | None = None

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        batches: list[Any],
        with_float: bool = False,
        use_quant_activations: bool = True,
        offload: bool = False,
    ) -> None:
        self.model, self.traced, self.batches = model, traced, batches
        self.streams = [Stream(len(batches), True, use_quant_activations, offload)]
        if with_float:
            self.streams.append(Stream(len(batches), False, False, offload))
        self.originals: dict[nn.Parameter, Tensor] = {}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(list(traced.graph.nodes)):
            for given in node.all_input_nodes:
                if given not in seen:
                    seen.add(given)
                    self._last.setdefault(node, []).append(given)

    @torch.no_grad()
    def run(self, visit: Visit, done: Callable[[], bool] = lambda: False) -> list[list[Any]]:
        """Run all nodes.

        Args:
            visit: called before each module.
            done: asked after each node; True ends the run.

        Returns:
            For each stream the model's outputs, a batch each; empty where ``done`` ended it.
        """
        inputs = [self._inputs(b) for b in self.batches]
        for node in self.traced.graph.nodes:
            module = self.traced.called(node)
            if module is not None:
                device = next((p.device for p in module.parameters()), None)
                calls = [
                    [s.call(node, b, device) for b in range(len(self.batches))]
                    for s in self.streams
                ]
                if self.look is not None:
                    for call in calls[0]:
                        self.look(node, call)
                visit(module, calls)
                self._compute(node, module, calls)
            elif node.op == "output":
                return [
                    [fx.node.map_arg(node.args[0], v.__getitem__) for v in s.values]
                    for s in self.streams
                ]
            else:
                for stream in self.streams:
                    for b in range(len(self.batches)):
                        stream.keep(node, b, self._plain(node, stream, b, inputs[b]))
            for old in self._last.get(node, ()):
                for stream in self.streams:
                    for held in stream.values:
                        held.pop(old, None)
            if done():
                return []
        return []

    def _compute(self, node: fx.Node, module: nn.Module, calls: list[list[Call]]) -> None:
        for stream, own in zip(self.streams, calls, strict=True):
            with stream.set_up(module, self.originals):
                for b, call in enumerate(own):
                    stream.keep(node, b, module(*call.args, **call.kwargs))

    def _plain(self, node: fx.Node, stream: Stream, batch: int, inputs: dict[str, Any]) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            if target.lstrip("*") in inputs:
                return inputs[target.lstrip("*")]
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            found: Any = self.model
            for part in target.split("."):
                found = getattr(found, part)
            return found
        call = stream.call(node, batch)
        if self.look is not None and stream is self.streams[0]:
            self.look(node, call)
        if node.op == "call_function":
            return target(*call.args, **call.kwargs)
        owner, *rest = call.args
        return getattr(owner, target)(*rest, **call.kwargs)

    def _inputs(self, batch: Any) -> dict[str, Any]:
        return arguments_of(self.model, batch)


def arguments_of(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The arguments of a model by their names, those that a batch gives."""
    if isinstance(batch, Mapping):
        return dict(batch)
    args = batch if isinstance(batch, (tuple, list)) else (batch,)
    kwargs = {}
    if isinstance(batch, Call):
        args, kwargs = batch.args, batch.kwargs
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _absent(model: nn.Module, batch: Any) -> set[str]:
    """The arguments that are None for a batch, which decides what the model does."""
    given = arguments_of(model, batch)
    found = set()
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if given.get(name, parameter.default) is None:
                found.add(name)
    return found


def traced_for_execution(model: nn.Module, batches: Batches) -> Traced | str:
    """The graph of a model that is to be run node by node, or why there is none."""
    if batches.is_callable:
        return "the model is run by a callable"
    try:
        absent = [_absent(model, batch) for batch in batches]
    except TypeError as error:
        return f"the batches aren't what forward takes: {error}"
    if any(names != absent[0] for names in absent):
        return "some batches leave out arguments that others give"
    traced = trace(model, leaves=is_leaf, absent=sorted(absent[0]))
    if isinstance(traced, str):
        return traced
    if model._forward_hooks or model._forward_pre_hooks:
        return "the model has hooks"
    leaves = set(traced.modules.values())
    for module in model.modules():
        inside = any(module is not x and module in set(x.modules()) for x in leaves)
        if module not in leaves and not inside and module is not model:
            if module._forward_hooks or module._forward_pre_hooks:
                return "a module that is traced through has hooks"
    return traced


def calls_of_layer(
    unit: nn.Module, layer: nn.Module, calls: list[Call], stream: Stream, originals: Any
) -> list[Tensor]:
    """What a layer inside of a module, or the module itself, is given in each call.

    Args:
        unit: the module that is called.
        layer: in it, or itself.
        calls: of the module.
        stream: how it computes.
        originals: float contents of parameters.
    """
    found: list[Tensor] = []

    def see(_: nn.Module, x: Tensor) -> None:
        found.append(x.detach())
        raise Reached

    with torch.no_grad(), stream.set_up(unit, originals), watching([layer], see):
        for call in calls:
            with suppress(Reached):
                unit(*call.args, **call.kwargs)
    return found
