"""A model's outputs when one module of it computes otherwise: only what depends on that module runs again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qframework.graph.batches import Batches
from qframework.graph.layer_inputs import call_with
from qframework.graph.node_execution import NodeExecution, traced_for_execution
from qframework.graph.ptq_measure import tensors_of


class CachedForward:
    """Keeps the results of all nodes of a model that torch.fx traces; another one is run as a whole.

    Args:
        model: in evaluation mode, its quantizers off.
        batches: see :class:`~qframework.graph.batches.Batches`.

    Attributes:
        exact: outputs, a list of tensors for each batch.
        runs: how many nodes, or whole models, were computed since the start.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model, self.batches, self.runs = model, batches, 0
        self.traced = traced_for_execution(model, batches)
        if isinstance(self.traced, str):
            self.exact = self._whole()
            return
        self.data = list(batches)
        self._execution = NodeExecution(model, self.traced, self.data)
        self._inputs = [self._execution._inputs(b) for b in self.data]
        self._held: list[dict[fx.Node, Any]] = [{} for _ in self.data]
        self.exact = self._run(set(self.traced.graph.nodes), self._held)

    def _whole(self) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            output = self.model(*args, **kwargs)
            self.runs += 1
            found.append(tensors_of(output))
            return output

        if self.batches.is_callable:
            self.batches.run(call)
        else:
            for batch in self.batches:
                call_with(call, batch)
        return found

    @torch.no_grad()
    def outputs(self, changed: nn.Module) -> list[list[Tensor]]:
        """Outputs as ``changed``, anywhere in the model, computes now.

        Args:
            changed: a module.
        """
        if isinstance(self.traced, str):
            return self._whole()
        again: set[fx.Node] = set()
        for node in self.traced.graph.nodes:
            module = self.traced.called(node)
            own = module is not None and any(m is changed for m in module.modules())
            if own or any(n in again for n in node.all_input_nodes):
                again.add(node)
        return self._run(again, [dict(h) for h in self._held])

    def _run(self, nodes: set[fx.Node], held: list[dict[fx.Node, Any]]) -> list[list[Tensor]]:
        stream = self._execution.streams[0]
        stream.values = held
        found: list[list[Tensor]] = [[] for _ in held]
        assert not isinstance(self.traced, str)
        for node in self.traced.graph.nodes:
            module = self.traced.called(node)
            for b in range(len(held)):
                if node.op == "output":
                    found[b] = tensors_of(fx.node.map_arg(node.args[0], held[b].__getitem__))
                elif node in nodes:
                    self.runs += 1
                    if module is None:
                        held[b][node] = self._execution._plain(node, stream, b, self._inputs[b])
                    else:
                        call = stream.call(node, b)
                        held[b][node] = module(*call.args, **call.kwargs)
        return found
