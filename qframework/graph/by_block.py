"""Post-training quantization block by block: each block is finished before the next one is touched."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph import recipe as r
from qframework.graph.batches import Batches
from qframework.graph.block_device import calls_on, on_device
from qframework.graph.block_execution import BlockExecution, planned_for_execution
from qframework.graph.block_plan import BlockPlan, map_tensors, unit_names
from qframework.graph.block_rounding import BlockRounding, round_one_block
from qframework.graph.layer_inputs import Call
from qframework.graph.layer_store import fingerprint_of
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.node_execution import Stream
from qframework.graph.ptq_measure import layer_records, sqnr_of_outputs
from qframework.graph.ptq_report import PTQReport, StepRecord
from qframework.graph.recipe_steps import Work, carry_out, mode_of, note
from qframework.graph.sequential import Visitor
from qframework.graph.tied_weights import tied_layers
from qframework.graph.unreached import borrow_scales
from qframework.graph.weight_source import WeightSource, fill
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import QuantProxy

#: Steps that see a block as the float model has it.
_ON_FLOATS = (r.CalibrateStep, r.BiasCorrectionStep, r.AWQStep, r.NormCorrectionStep)


class NotByBlockError(ValueError, TypeError):
    """A model or a recipe that can't be gone through block by block."""


def float_steps(plan: r.Recipe, model: nn.Module) -> list[str]:
    """The steps that change float weights of a model."""
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return [
        s.step
        for s in plan.steps
        if isinstance(s, r.FloatStep) and (norms or not isinstance(s, r.MergeBatchNormStep))
    ]


def changes_in_place(plan: r.Recipe, model: nn.Module) -> bool:
    """Whether steps write into tensors that a copy may share with the model."""
    others = (r.AWQStep, r.NormCorrectionStep, r.LowRankStep)
    return bool(float_steps(plan, model)) or any(isinstance(s, others) for s in plan.steps)


def check_by_block(plan: r.Recipe, model: nn.Module, has_source: bool) -> None:
    """Refuse what needs more than one block at a time.

    Raises:
        NotByBlockError: a step before ``quantize``, where weights aren't there yet.
    """
    before = float_steps(plan, model)
    if has_source and before:
        raise NotByBlockError(
            f"ptq: {before[0]!r} needs the weights of all of the model, which come block by block with weights=; give a recipe "
            "without it, or a model that has its weights"
        )


def plan_of(model: nn.Module, quantized: nn.Module, data: Batches, on_meta: bool) -> BlockPlan:
    """The blocks of a float model, and beside them what holds quantizers.

    Args:
        model: in evaluation mode.
        quantized: the same with quantizers.
        data: batches.
        on_meta: whether the model has no weights, so that a batch without contents is run.

    Raises:
        NotByBlockError: it has none, or can't be run by them.
    """
    names, known = unit_names(quantized), dict(model.named_modules())
    made = [n for n in names if n not in known]
    if made:
        raise NotByBlockError(
            f"ptq: by_block=True, but {made[0]!r} quantizes a function between blocks; leave out functions=True"
        )
    if on_meta and not data.is_callable:
        data = Batches([map_tensors(lambda t: t.to("meta"), next(iter(data)))])
    plan = planned_for_execution(model, data, names)
    if isinstance(plan, str):
        raise NotByBlockError(
            f"ptq: by_block=True, but {type(model).__name__} can't be run so: {plan}"
        )
    return plan


def with_same_tensors(model: nn.Module) -> nn.Module:
    """A copy that shares its parameters with the model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclass
class ByBlock:
    """Carries out the steps behind ``quantize`` for each block.

    Attributes:
        work: with the quantized model.
        plan: of the float model.
        steps: behind ``quantize``, with their numbers.
        float_tensors: the float model's parameters and buffers, by names.
        source: of weights; None where the model has them.
        offload: see :class:`~qframework.graph.activation_store.ActivationStore`; finished weights go there too.
        tell: called with the number of a block and their count before each.
        device: where each block is for its turn, and what goes in; None for where it is.
        tied: layers whose weight is held elsewhere in the model too, and where.
    """

    work: Work
    plan: BlockPlan
    steps: list[tuple[int, Any]]
    float_tensors: Mapping[str, Tensor]
    source: WeightSource | None
    offload: bool | str | Path
    tell: Callable[[int, int], None]
    device: torch.device | None = None
    tied: dict[nn.Module, list[str]] = field(default_factory=dict)

    def run(self, report: PTQReport) -> None:
        """Go through all blocks, and fill the report."""
        model = self.work.model
        units = [replace(u, module=model.get_submodule(u.name)) for u in self.plan.units]
        self.plan = BlockPlan(units, self.plan.at_end, self.plan.unreached)
        records = [StepRecord(step=s.step) for _, s in self.steps]
        self.tied = tied_layers(model, [m for m in model.modules() if _has_weight(m)])
        self._fill_ancestors(model)
        execution = BlockExecution(
            model, self.plan, list(self.work.batches), with_float=True, offload=self.offload
        )
        for place, unit in enumerate(units):
            self.tell(place, len(units))
            if self.source is not None:
                fill(unit.module, f"{unit.name}.", self.float_tensors, self.source)
                if self.work.store is not None:
                    self.work.store.check(unit.name, fingerprint_of(unit.module))
            calls = execution.calls(place)
            with on_device(unit, self.device):
                calls = calls_on(calls, self.device)
                execution.compute(place, calls, (1,))
                if any(isinstance(m, QuantProxy) for m in unit.module.modules()):
                    made = self._block(unit.name, unit.module, calls, records, report)
                    if made is not unit.module:
                        model.set_submodule(unit.name, made)
                        unit.module = made
                execution.originals = {}
                execution.compute(place, calls, (0,))
                del calls
            self._put_away(execution, unit.module)
        for name in self.plan.unreached:
            self._unreached(name, model.get_submodule(name), records, report)
        self._borrow(model, records)
        report.steps += records
        if report.sqnr is None:
            exact, found = (execution.outputs()[i] for i in (1, 0))
            report.sqnr = sqnr_of_outputs(exact, found)

    def _fill_ancestors(self, model: nn.Module) -> None:
        """Weights that no unit holds."""
        if self.source is None:
            return
        names = [u.name for u in self.plan.units]
        for name, module in model.named_modules():
            if not any(name == n or name.startswith(n + ".") for n in names):
                start = f"{name}." if name else ""
                fill(module, start, self.float_tensors, self.source, recurse=False)

    def _block(
        self,
        name: str,
        block: nn.Module,
        calls: list[dict[int, Call]],
        records: list[StepRecord],
        report: PTQReport,
    ) -> nn.Module:
        quantized, exact = (list(own.values()) for own in calls)
        sub = replace(
            self.work,
            model=block,
            batches=Batches(quantized),
            errors={},
            seconds={},
            notes={},
            originals=_float_weights(block),
            is_block=True,
        )
        if not quantized:
            self._unreached(name, block, records, report)
            return block
        if sub.store is not None:
            sub.store.prefix = f"{name}."
        for (number, step), record in zip(self.steps, records, strict=True):
            if sub.store is not None:
                sub.store.step = number
            start = time.perf_counter()
            found = self._step(step, name, sub, quantized, exact)
            record.seconds += time.perf_counter() - start
            record.changed |= _named(name, found.changed)
            record.skipped |= _named(name, found.skipped)
            record.way = "block by block"
            if isinstance(step, (r.AWQStep, r.LowRankStep)):
                sub.originals = _float_weights(sub.model)
        sub.batches = Batches(quantized)
        for entry in layer_records(sub):
            entry.name = f"{name}.{entry.name}" if entry.name else name
            report.layers.append(entry)
        return sub.model

    def _step(
        self, step: Any, name: str, sub: Work, quantized: list[Call], exact: list[Call]
    ) -> StepRecord:
        record = StepRecord(step=step.step)
        if isinstance(step, r.LearnedRoundStep) and step.blocks is not None:
            done = BlockRounding(sub.model)
            self._prepare(done, name, sub)
            with done:
                how = (step.method, step.steps, step.lr, step.batch_size)
                round_one_block(done, sub.model, name, [quantized, exact], how, sub.recipe.seed)
            note(done, sub, record)
            record.skipped = {"" if n == name else n: why for n, why in record.skipped.items()}
            return record
        mode = mode_of(step, sub)
        if mode is not None:
            self._prepare(mode, name, sub)
            with mode as run:
                visitor = Visitor(run, _streams(run))
                visitor(sub.model, [quantized, exact] if run.needs_float_inputs else [quantized])
                run.leave_unreached(visitor.remaining)
            note(mode, sub, record)
            return record
        sub.batches = Batches(exact if isinstance(step, _ON_FLOATS) else quantized)
        return carry_out(step, sub)

    def _prepare(self, mode: Any, name: str, sub: Work) -> None:
        mode.restores, mode.store = False, sub.store
        mode.tied, mode.prefix = self.tied, f"{name}."

    def _unreached(
        self, name: str, block: nn.Module, records: list[StepRecord], report: PTQReport
    ) -> None:
        """Layers of a block that no batch reached keep the nearest values."""
        if self.source is not None:
            fill(block, f"{name}.", self.float_tensors, self.source)
        for inner, module in block.named_modules():
            if _is_weighted(module):
                full = f"{name}.{inner}" if inner else name
                for record in records:
                    record.skipped[full] = "no batch reached it"
        sub = replace(self.work, model=block, originals=_float_weights(block), seconds={}, notes={})
        for entry in layer_records(sub, measured=False):
            entry.name = f"{name}.{entry.name}" if entry.name else name
            entry.note = "no batch reached it"
            report.layers.append(entry)

    def _borrow(self, model: nn.Module, records: list[StepRecord]) -> None:
        """Scales of quantizers that no batch reached, and a warning that names them."""
        for record in records:
            if record.step == "calibrate":
                found = borrow_scales(model, self.work.calibrated)
                record.skipped |= found
                if found:
                    text = "; ".join(f"{n}: {what}" for n, what in found.items())
                    warnings.warn(f"ptq: {text}", UserWarning, stacklevel=5)

    def _put_away(self, execution: BlockExecution, block: nn.Module) -> None:
        """Move the numbers of a finished block to where activations are kept."""
        if isinstance(self.offload, bool):
            return
        with torch.no_grad():
            for tensor in [*block.parameters(), *block.buffers()]:
                if tensor.numel() and not tensor.is_meta and tensor.device.type == "cpu":
                    tensor.data = execution.store.keep(tensor.data)


def _has_weight(module: nn.Module) -> bool:
    return _is_weighted(module) and module._parameters.get("weight") is not None


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, QuantWeightBiasInputOutputLayer) and isinstance(module, WEIGHTED)


def _float_weights(block: nn.Module) -> dict[str, Tensor]:
    """The float weights of quantized layers, which algorithms give new parameters."""
    found = {}
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if "weight_quant" in module._modules and weight is not None:
            found[name] = weight.detach()
    return found


def _streams(mode: Any) -> list[Any]:
    streams = [Stream(0, True, mode.use_quant_activations, False)]
    return [*streams, Stream(0, False, False, False)] if mode.needs_float_inputs else streams


def _named(block: str, found: Mapping[str, str]) -> dict[str, str]:
    return {f"{block}.{n}" if n else block: what for n, what in found.items()}
