"""How each step of a recipe is carried out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qframework.graph import recipe as r
from qframework.graph.activation_equalization import activation_equalization_mode
from qframework.graph.awq import awq
from qframework.graph.batches import Batches
from qframework.graph.block_rounding import round_blocks
from qframework.graph.calibrate import calibration_mode
from qframework.graph.channel_splitting import GraphChannelSplitting
from qframework.graph.conversion_report import QuantizationReport
from qframework.graph.corrections import bias_correction_mode, norm_correction_mode
from qframework.graph.cross_layer_equalization import EqualizeGraph
from qframework.graph.gpfq import GPFQ, gpfq_mode
from qframework.graph.gptq import gptq_mode
from qframework.graph.graph_pass import GraphPass
from qframework.graph.layer_by_layer import LayerByLayer
from qframework.graph.layer_inputs import Reached
from qframework.graph.layer_norm_folding import LayerNormToRMS, MergeLnAffine
from qframework.graph.layer_store import LayerStore
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.learned_round import learned_round_mode
from qframework.graph.magr import magr_mode
from qframework.graph.ptq_report import StepRecord
from qframework.graph.qronos import Qronos
from qframework.graph.quantize_model import quantize_model
from qframework.graph.rotation_equalization import GraphRotationEqualization
from qframework.graph.sequential import quantize_in_order
from qframework.graph.standardize import MergeBatchNorm
from qframework.graph.svd_quant import LayerwiseLowRankCorrection
from qframework.graph.unreached import borrow_scales, noting_calls
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer


@dataclass
class Work:
    """What steps share.

    Attributes:
        model: as it is by now.
        batches: for calibration.
        recipe: whose steps they are.
        keep_best: leave layers alone that would end worse.
        strict: refuse what stays float.
        offload: keep activations between layers on the CPU, or in memory-mapped files in a folder.
        store: of finished layers.
        errors: from names of layers to errors that steps measured.
        seconds: for each layer.
        notes: from names of layers to why they are as they are.
        originals: float weights of quantized layers, by names.
        conversion: what ``quantize`` did.
        calibrated: quantizers of activations that data reached.
        is_block: whether ``model`` is a part of another one.
    """

    model: nn.Module
    batches: Batches
    recipe: r.Recipe
    keep_best: bool
    strict: bool
    offload: bool | str | Path
    store: LayerStore | None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    conversion: QuantizationReport = field(default_factory=QuantizationReport)
    calibrated: set[nn.Module] = field(default_factory=set)
    is_block: bool = False

    def example(self) -> tuple[Any, ...]:
        """Arguments by which a graph is recorded where the model can't be traced."""
        found: list[tuple[Any, ...]] = []

        def see(model: Any, args: Any, kwargs: Any) -> None:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            found.append(bound.args)
            raise Reached

        handle = self.model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            with suppress(Reached):
                self.batches.run(self.model)
        finally:
            handle.remove()
        return found[0] if found else ()


def carry_out(step: Any, work: Work) -> StepRecord:
    """Carry out one step."""
    record = StepRecord(step=step.step)
    _STEPS[type(step)](step, work, record)
    return record


def _graph_pass(made: GraphPass, work: Work, record: StepRecord) -> None:
    work.model = made.apply(work.model, *work.example())
    record.changed, record.skipped = made.report.changed, made.report.skipped
    record.way = made.report.way


def _activation_equalize(step: Any, work: Work, record: StepRecord) -> None:
    example = () if step.layerwise else work.example()
    with (
        activation_equalization_mode(
            work.model,
            step.alpha,
            layerwise=step.layerwise,
            blacklist_layers=step.blacklist_layers,
            example_input=example,
        ) as run,
        torch.no_grad(),
    ):
        work.batches.run(work.model)
    record.changed, record.skipped = run.report.changed, run.report.skipped
    record.way = run.report.way


def _quantize(step: Any, work: Work, record: StepRecord) -> None:
    arguments = work.recipe.layers.arguments()
    example = work.example() if arguments["functions"] else None
    work.model, report = quantize_model(
        work.model, strict=work.strict, example_input=example or None, **arguments
    )
    work.model.eval()
    work.conversion = report
    record.changed = {e.name: f"a {e.quantized_type}" for e in report.replaced}
    record.skipped = {e.name: e.reason for e in report.unsupported}


def _calibrate(step: Any, work: Work, record: StepRecord) -> None:
    with (
        torch.no_grad(),
        noting_calls(work.model, work.calibrated),
        calibration_mode(work.model),
    ):
        work.batches.run(work.model)
    if not work.is_block:
        record.skipped = borrow_scales(work.model, work.calibrated)
    for name, module in work.model.named_modules():
        proxy: Any = module._modules.get("input_quant") or module._modules.get("act_quant")
        if proxy is not None and proxy.is_quant_enabled:
            record.changed[name] = "calibrated"


def _choose(step: Any, work: Work, record: StepRecord) -> None:
    mode = mode_of(step, work)
    if mode is None:
        done = round_blocks(
            work.model,
            work.batches,
            step.blocks,
            step.method,
            step.steps,
            step.lr,
            step.batch_size,
            work.recipe.seed,
            work.store,
        )
        note(done, work, record)
        return
    mode.store = work.store
    quantize_in_order(mode, work.batches, work.offload)
    note(mode, work, record)


def mode_of(step: Any, work: Work) -> LayerByLayer | None:
    """The context by which a step chooses values layer by layer; None for other steps."""
    options: dict[str, Any] = _options(work)
    if isinstance(step, r.LearnedRoundStep):
        if step.blocks is not None:
            return None
        options |= {"method": step.method, "steps": step.steps, "lr": step.lr}
        return learned_round_mode(work.model, **options)
    if not isinstance(step, (r.GPTQStep, r.GPFQStep, r.QronosStep)):
        return None
    options["act_order"] = step.act_order
    options["use_quant_activations"] = step.use_quant_activations
    if isinstance(step, r.GPTQStep):
        return gptq_mode(work.model, **options)
    algorithm = Qronos if isinstance(step, r.QronosStep) else GPFQ
    return gpfq_mode(work.model, algorithm_impl=algorithm, **options)


def note(mode: LayerByLayer, work: Work, record: StepRecord) -> None:
    """Record what a context did."""
    record.changed = dict.fromkeys(mode.updated, "new values")
    record.skipped = {**mode.failed, **dict.fromkeys(mode.kept, "its error would have been larger")}
    work.errors.update(mode.errors)
    work.notes.update(record.skipped)
    for name, seconds in mode.seconds.items():
        work.seconds[name] = work.seconds.get(name, 0.0) + seconds
    mode.float_weights = {}  # they needn't wait for the garbage collector


def _options(work: Work) -> dict[str, Any]:
    return {
        "device": work.recipe.device or "same",
        "dtype": work.recipe.torch_dtype,
        "measure": True,
        "keep_best": work.keep_best,
    }


def _magr(step: Any, work: Work, record: StepRecord) -> None:
    mode = magr_mode(
        work.model,
        alpha=step.alpha,
        num_steps=step.num_steps,
        device=work.recipe.device or "same",
        dtype=work.recipe.torch_dtype,
    )
    quantize_in_order(mode, work.batches)
    record.changed = dict.fromkeys(mode.updated, "smaller largest weights")
    record.skipped = dict(mode.failed)


def _low_rank(step: Any, work: Work, record: StepRecord) -> None:
    made = LayerwiseLowRankCorrection(work.model)
    record.skipped = made.skipped
    work.model, errors = made.apply(step.rank, step.iters, work.recipe.torch_dtype)
    record.changed = {
        n: f"relative error of the weight {float(e):.3g}"
        for n, e in zip(made.names, errors, strict=True)
    }


def _bias_correction(step: Any, work: Work, record: StepRecord) -> None:
    before = _biases(work.model)
    with (
        torch.no_grad(),
        bias_correction_mode(
            work.model, skip_if_no_bias=step.skip_if_no_bias, float_weights=work.originals
        ),
    ):
        work.batches.run(work.model)
    for name, bias in _biases(work.model).items():
        old = before[name]
        if bias is not None and (old is None or not torch.equal(old, bias)):
            record.changed[name] = "bias corrected" if old is not None else "bias added"


def _biases(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantWeightBiasInputOutputLayer) and isinstance(module, WEIGHTED):
            found[name] = None if module.bias is None else module.bias.detach().clone()
    return found


def _norm_correction(step: Any, work: Work, record: StepRecord) -> None:
    with torch.no_grad(), norm_correction_mode(work.model):
        work.batches.run(work.model)
    for name, module in work.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            record.changed[name] = "statistics estimated anew"


def _awq(step: Any, work: Work, record: StepRecord) -> None:
    done = awq(work.model, work.batches, grid=step.grid, clip=step.clip)
    record.changed, record.skipped = done.report.changed, done.report.skipped
    record.way = done.report.way


def _pass_of(make: Callable[[Any, Work], GraphPass]) -> Callable[[Any, Work, StepRecord], None]:
    return lambda step, work, record: _graph_pass(make(step, work), work, record)


_STEPS: dict[type, Callable[[Any, Work, StepRecord], None]] = {
    r.MergeBatchNormStep: _pass_of(lambda s, w: MergeBatchNorm()),
    r.EqualizeStep: _pass_of(
        lambda s, w: EqualizeGraph(
            s.iterations,
            s.threshold,
            False,
            s.merge_bias,
            s.bias_shrinkage,
            s.scale_computation_type,
        )
    ),
    r.ActivationEqualizeStep: _activation_equalize,
    r.MergeLnAffineStep: _pass_of(lambda s, w: MergeLnAffine()),
    r.LayerNormToRMSStep: _pass_of(lambda s, w: LayerNormToRMS()),
    r.RotateStep: _pass_of(
        lambda s, w: GraphRotationEqualization(
            s.blacklist_layers,
            s.orphan_sink,
            full_rotation_method=s.full_rotation_method,
            seed=w.recipe.seed,
        )
    ),
    r.ChannelSplittingStep: _pass_of(
        lambda s, w: GraphChannelSplitting(s.split_ratio, split_input=s.split_input)
    ),
    r.MagRStep: _magr,
    r.QuantizeStep: _quantize,
    r.AWQStep: _awq,
    r.CalibrateStep: _calibrate,
    r.GPTQStep: _choose,
    r.GPFQStep: _choose,
    r.QronosStep: _choose,
    r.LearnedRoundStep: _choose,
    r.LowRankStep: _low_rank,
    r.BiasCorrectionStep: _bias_correction,
    r.NormCorrectionStep: _norm_correction,
}
