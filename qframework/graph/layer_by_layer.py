"""Contexts that change the weights of a model one layer after the other, each from what its inputs are by then."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.core.snapshot import Snapshot
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_inputs import Reached, watching
from qframework.graph.layer_store import LayerStore
from qframework.graph.layer_view import WEIGHTED, LayerView
from qframework.graph.quantizers_off import quantizers_off, with_weights
from qframework.graph.single_layers import is_single_layer, told
from qframework.graph.solvers import NotSolvable
from qframework.graph.tied_weights import tied_layers
from qframework.graph.weight_grid import NoGrid, grid_of
from qframework.graph.weight_writing import own_parameter, write_weight
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer


class RunningModel:
    """Calls a model up to the layer whose turn it is; all else is the model's own."""

    def __init__(self, mode: LayerByLayer, model: nn.Module) -> None:
        self._mode, self._model = mode, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; the output where ``return_forward_output`` asks for it, else None."""
        return self._mode._run(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class LayerByLayer:
    """What the contexts have in common.

    ::

        with gptq_mode(model) as run:
            for _ in range(run.num_layers):
                for batch in batches:
                    run.model(batch)
                run.update()

    Layers have their turn in the order in which the model calls them. Nothing stays on the model: hooks are there while
    ``run.model`` runs, the float weights live in the context. If the body raises, the model is as it was.

    Args:
        model: with quantized layers, calibrated, in evaluation mode.
        group_of_parallel_layers: lists of names of layers that get their inputs in the same pass, such as query, key and value.
        inplace: change the model itself; if not, ``run.model`` calls a copy, which ``run.result`` is.
        create_weight_orig: keep the float weights, for the float path.
        use_quant_activations: let activations be quantized in the pass.
        act_order: quantize columns with the largest inputs first.
        return_forward_output: let ``run.model`` run to its end and return the output.
        device: where statistics are kept; ``"same"`` for that of the layer.
        dtype: of the statistics and the arithmetic.
        measure: fill :attr:`errors`.
        keep_best: leave layers alone whose error would be larger than with the nearest values.

    Attributes:
        model: what to call with batches; a tensor of a batch is given as to the model.
        num_layers: how many passes and updates there are to be.
        failed: from names of layers that were left as they were to the reason.
        updated: names of layers whose weight was changed, in order.
        float_weights: afterwards, from names of layers to their weights before, with ``create_weight_orig``.
        seconds: for each layer.
        store: where finished layers are kept; None for nowhere.
        restores: whether an exception leaves the model as it was, for which weights are kept.
        tied: layers whose weight is held outside of the model too, and where.
        prefix: of names, where they are told.
        kept: names of layers that ``keep_best`` left alone.
        errors: with ``measure``, from names of layers to the relative squared error of their outputs on the batches, with
            weights rounded to the nearest value and as they are now.
    """

    #: Whether each batch runs through the float model too.
    needs_float_inputs = False
    #: Whether the layers have to have quantized weights.
    needs_quantized = True
    #: Whether one pass serves all layers.
    one_pass = False

    def __init__(
        self,
        model: nn.Module,
        group_of_parallel_layers: Sequence[Sequence[str]] | None = None,
        inplace: bool = True,
        create_weight_orig: bool = True,
        use_quant_activations: bool = True,
        act_order: bool = False,
        return_forward_output: bool = False,
        device: torch.device | str = "same",
        dtype: torch.dtype = torch.float32,
        measure: bool = False,
        keep_best: bool = False,
    ) -> None:
        check_module(model, type(self).__name__)
        self.measure, self.keep_best = measure or keep_best, keep_best
        self.result = model if inplace else copy.deepcopy(model)
        self.act_order, self.device, self.dtype = act_order, device, dtype
        self.use_quant_activations = use_quant_activations
        self.return_forward_output = return_forward_output
        self.create_weight_orig = create_weight_orig
        self.parallel = _check_groups(self.result, group_of_parallel_layers, type(self).__name__)
        self.model = RunningModel(self, self.result)
        self.failed: dict[str, str] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.updated: list[str] = []
        self.kept: list[str] = []
        self.seconds: dict[str, float] = {}
        self.store: LayerStore | None = None
        self.restores = True
        self.tied: dict[nn.Module, list[str]] = {}
        self.prefix = ""
        self.weight_orig: dict[nn.Parameter, Tensor] = {}
        self.float_weights: dict[str, Tensor] = {}
        self._names: dict[nn.Module, str] = {}
        self._statistics: dict[nn.Module, InputStatistics] = {}
        self._turn: set[nn.Module] = set()
        self._before: list[Snapshot] = []

    # ------------------------------------------------------------ the context

    def __enter__(self) -> Self:
        self._names = {m: n for n, m in self.result.named_modules() if self._takes(m)}
        if self.needs_quantized:
            tied = tied_layers(self.result, list(self._names)) | self.tied
            for module in [m for m in self._names if m in tied]:
                self.failed[self._names.pop(module)] = (
                    f"its weight is {', '.join(tied[module])} too"
                )
        if is_single_layer(self.result) and not self.prefix:  # not one block of several
            if not self._names and not self.failed:
                self.failed[""] = told(self.result, self.takes)
        self._remaining = list(self._names)
        grouped = {n: i for i, names in enumerate(self.parallel) for n in names}
        self._group_of = {m: grouped.get(n, n) for m, n in self._names.items()}
        self.num_layers = len(set(self._group_of.values()))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            for before in reversed(self._before):
                before.restore()
        self._statistics.clear()
        self._before.clear()
        names = {m._parameters.get("weight"): n for m, n in self._names.items()}
        self.float_weights = {names[p]: w for p, w in self.weight_orig.items() if p in names}
        self.weight_orig.clear()
        if kind is None and self.failed:
            found = [(f"{self.prefix}{n}".strip("."), why) for n, why in self.failed.items()]
            text = "; ".join(f"{n or 'the model'}: {why}" for n, why in found)
            warnings.warn(
                f"{type(self).__name__} left layers as they were: {text}", UserWarning, stacklevel=2
            )

    @property
    def takes(self) -> str:
        """What layers a model has to have, for messages."""
        which = " with a quantized weight" if self.needs_quantized else ""
        return f"it has no linear layer or convolution{which}"

    def _takes(self, module: nn.Module) -> bool:
        if self.needs_quantized:
            return (
                isinstance(module, QuantWeightBiasInputOutputLayer)
                and isinstance(module, WEIGHTED)
                and module.weight_quant.is_quant_enabled
                and not module.weight_quant.requires_quant_input
                and "weight" in module._parameters
            )
        return isinstance(module, WEIGHTED) and "weight" in module._parameters

    # ------------------------------------------------------------ passes

    @torch.no_grad()
    def _run(self, args: Any, kwargs: Any) -> Any:
        output = self._pass(args, kwargs, self._see_quantized, quantized=True)
        if self.needs_float_inputs:
            self._pass(args, kwargs, self._see_float, quantized=False)
        return output if self.return_forward_output else None

    def _pass(self, args: Any, kwargs: Any, see: Any, quantized: bool) -> Any:
        self._seen_now: set[nn.Module] = set()
        with ExitStack() as stack:
            if not quantized:
                stack.enter_context(quantizers_off(self.result))
                stack.enter_context(with_weights(self.weight_orig))
            elif not self.use_quant_activations:
                stack.enter_context(quantizers_off(self.result, weights=False, biases=False))
            stack.enter_context(watching(self._remaining, see))
            try:
                return self.result(*args, **kwargs)
            except Reached:
                return None

    def _comes(self, layer: nn.Module) -> bool:
        """Whether it is a layer's turn; the first one that is called has it, and those parallel to it."""
        if not self._turn:
            self._turn = {m for m in self._remaining if self._group_of[m] == self._group_of[layer]}
        return layer in self._turn

    def _see_quantized(self, layer: nn.Module, x: Tensor) -> None:
        self._see(layer, x, is_float=False)

    def _see_float(self, layer: nn.Module, x: Tensor) -> None:
        self._see(layer, x, is_float=True)

    def _see(self, layer: nn.Module, x: Tensor, is_float: bool) -> None:
        if not self._comes(layer):
            return
        if layer not in self._statistics:
            where = x.device if self.device == "same" else self.device
            self._statistics[layer] = InputStatistics(
                LayerView(layer), torch.device(where), self.dtype, self.needs_float_inputs
            )
        self._statistics[layer].add(x, is_float)
        self._seen_now.add(layer)
        if self._seen_now >= self._turn and not self.return_forward_output:
            raise Reached

    # ------------------------------------------------------------ updates

    @torch.no_grad()
    def update(self) -> None:
        """Change the weights of the layers whose turn it was."""
        if not self._turn:
            for layer in self._remaining:
                self.failed[self._names[layer]] = "no batch reached it"
            self._remaining = []
            return
        for layer in [m for m in self._remaining if m in self._turn]:
            self._remaining.remove(layer)
            statistics = self._statistics.pop(layer, None)
            if statistics is None:
                self.failed[self._names[layer]] = "no batch reached it"
            else:
                self._update(layer, partial(_as_it_is, statistics))
        self._turn = set()

    @property
    def remaining(self) -> list[nn.Module]:
        """Layers that haven't had their turn."""
        return list(self._remaining)

    def update_from(
        self, layer: nn.Module, quantized: list[Tensor], exact: list[Tensor] | None = None
    ) -> None:
        """Change the weight of one layer.

        Args:
            layer: one of :attr:`remaining`.
            quantized: its inputs in the quantized model, in order; emptied, so that they needn't stay in memory.
            exact: those in the float model, where ``needs_float_inputs``; likewise.
        """
        self._remaining.remove(layer)
        if not quantized:
            self.failed[self._names[layer]] = "no batch reached it"
            return
        where = quantized[0].device if self.device == "same" else torch.device(self.device)

        def collected() -> InputStatistics:
            made = InputStatistics(LayerView(layer), where, self.dtype, self.needs_float_inputs)
            for rest in (quantized, exact):
                if rest is not None:
                    rest.reverse()
            while quantized:
                made.add(quantized.pop())
                if exact is not None:
                    made.add(exact.pop(), is_float=True)
            return made

        self._update(layer, collected)

    def leave_unreached(self, layers: set[nn.Module]) -> None:
        """Note layers that no batch reached."""
        for layer in [m for m in self._remaining if m in layers]:
            self.failed[self._names[layer]] = "no batch reached it"
            self._remaining.remove(layer)

    def _update(self, layer: nn.Module, collected: Callable[[], InputStatistics]) -> None:
        name = self._names[layer]
        if self.restores:
            self._before.append(Snapshot(layer))
        weight: Any = layer._parameters["weight"]
        original = weight.detach()
        if isinstance(layer, QuantWeightBiasInputOutputLayer):
            weight = own_parameter(layer)  # what it was stays in the old one
        else:
            original = original.clone()
        if self.create_weight_orig or self.needs_float_inputs:
            self.weight_orig.setdefault(weight, original)
        start = time.perf_counter()
        note = None if self.store is None else self.store.load(name, layer)
        if note is not None:
            self._take_note(name, note)
            return
        try:
            if self.change(layer, collected):
                self.updated.append(name)
        except (NoGrid, NotSolvable) as error:
            self.failed[name] = str(error)
        self.seconds[name] = time.perf_counter() - start
        if self.store is not None:
            self.store.save(name, layer, self._note(name))

    def _note(self, name: str) -> dict[str, Any]:
        return {
            "updated": name in self.updated,
            "kept": name in self.kept,
            "failed": self.failed.get(name, ""),
            "errors": list(self.errors.get(name, ())),
        }

    def _take_note(self, name: str, note: dict[str, Any]) -> None:
        """As :meth:`change` had left it."""
        if note["updated"]:
            self.updated.append(name)
        if note["kept"]:
            self.kept.append(name)
        if note["failed"]:
            self.failed[name] = note["failed"]
        if note["errors"]:
            self.errors[name] = (note["errors"][0], note["errors"][1])

    def change(self, layer: nn.Module, collected: Callable[[], InputStatistics]) -> bool:
        """Give a layer its quantized weight; returns whether it could be written.

        Args:
            layer: whose turn it is.
            collected: gives the statistics of its inputs, once; they take more memory than all else, so they are there for as short
                as can be.

        Raises:
            NoGrid: its quantizer's values aren't known.
            NotSolvable: its statistics don't allow it.
        """
        held: Any = layer
        view = LayerView(layer)
        weight = held._parameters["weight"]
        grid = grid_of(held.weight_quant, weight)
        statistics = collected()
        where = statistics.device
        of_matrix = grid.matrix(view).to(where, self.dtype)

        def whole() -> Tensor:
            matrix = view.to_matrix(weight.detach()).to(where, self.dtype)
            return matrix.clone(memory_format=torch.contiguous_format)

        nearest = statistics.relative_error(whole(), of_matrix) if self.measure else 0.0
        solved = self.solve(whole(), statistics, of_matrix)
        if not bool(torch.isfinite(solved).all()):
            raise NotSolvable("the result isn't finite; give more samples, or dtype=torch.float64")
        if self.measure:
            now = statistics.relative_error(whole(), solved)
            worse = self.keep_best and now > nearest
            self.errors[self._names[layer]] = (nearest, nearest if worse else now)
            if worse:
                self.kept.append(self._names[layer])
                return False
        del statistics
        if not write_weight(
            layer, view.from_matrix(solved.to(weight.device)), grid, self.weight_orig.get(weight)
        ):
            raise NoGrid(f"{held.weight_quant.quantizer.__name__} can't be given these values")
        return True

    def solve(self, weights: Tensor, statistics: InputStatistics, grid: Any) -> Tensor:
        """For subclasses: the quantized matrix."""
        raise TypeError(f"{type(self).__name__} has to define solve(weights, statistics, grid)")


def _as_it_is(statistics: InputStatistics) -> InputStatistics:
    return statistics


def _check_groups(
    model: nn.Module, groups: Sequence[Sequence[str]] | None, who: str
) -> list[list[str]]:
    names = {n for n, _ in model.named_modules()}
    for name in [n for group in groups or () for n in group]:
        if name not in names:
            raise ValueError(
                f"{who}: group_of_parallel_layers names {name!r}, which the model doesn't have"
            )
    return [list(group) for group in groups or ()]
