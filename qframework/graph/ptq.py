"""From a trained float model and some batches to a quantized model, by a recipe."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.batches import Batches
from qframework.graph.block_device import device_of
from qframework.graph.built_in_recipes import find_recipe
from qframework.graph.by_block import (
    ByBlock,
    changes_in_place,
    check_by_block,
    plan_of,
    with_same_tensors,
)
from qframework.graph.function_kinds import PRODUCTS
from qframework.graph.layer_store import LayerStore, fingerprint_of
from qframework.graph.progress import Bar, progress_bar
from qframework.graph.ptq_measure import layer_records, output_sqnr
from qframework.graph.ptq_report import PTQReport, StepRecord
from qframework.graph.recipe import QuantizeStep, Recipe
from qframework.graph.recipe_steps import Work, carry_out
from qframework.graph.weight_source import WeightSource

_FOLDING = ("merge_batch_norm", "merge_ln_affine", "layer_norm_to_rms")


def ptq(
    model: nn.Module,
    batches: Any,
    recipe: Any,
    *,
    keep_best: bool = True,
    strict: bool = False,
    resume: str | Path | None = None,
    offload: bool | str | Path = False,
    by_block: bool = False,
    weights: Any = None,
    progress: bool = True,
) -> tuple[nn.Module, PTQReport]:
    """Quantize a trained model without training it.

    ::

        quantized, report = ptq(model, batches, "w4a8-gptq")
        print(report)

    Args:
        model: float; not touched.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that is given a model
            and runs it. It is gone through several times.
        recipe: a :class:`~qframework.graph.Recipe`, the name of a built-in one, or a dict.
        keep_best: let a layer whose error would be larger than with nearest values keep those.
        strict: refuse layers and matrix products that would stay float.
        resume: a folder, in which finished layers are kept; a run that was interrupted goes on there, with the same bits.
        offload: keep activations between layers on the CPU; a folder, for memory-mapped files, in which with ``by_block`` finished
            blocks are as well.
        by_block: finish each block (the parts of the model's ``nn.Sequential`` and ``nn.ModuleList`` modules) before the next one is
            touched, so that beside the model there are one block, what its layers' inputs tell, and the activations between blocks.
            Each block is on the recipe's ``device`` for its turn, and its inputs with it; all else stays where it is.
        weights: those of a model on the ``meta`` device, read when their block has its turn: a state dict, a function from a name to
            its tensor, or a path of safetensors. Goes with ``by_block``.
        progress: show a bar with the time left (by rich or tqdm, where installed), where a person looks on.

    Returns:
        The quantized model, in evaluation mode, and a report.

    Raises:
        ValueError: an unknown recipe, one whose steps can't follow each other, a device that can't be used, batches that are used
            up, with ``strict`` what stays float, or with ``by_block`` a model that has no blocks. Nothing was done to the model.

    Warns:
        UserWarning: a step that changed nothing; layers that no batch reached.
    """
    check_module(model, "ptq")
    plan = find_recipe(recipe)
    device_of(plan)
    data = Batches(batches)
    start = time.perf_counter()
    with _own_random_numbers(model, plan), progress_bar(None if progress else False) as bar:
        store = None
        if resume is not None:
            identity = f"{plan.model_dump_json()}{keep_best}{fingerprint_of(model)}"
            store = LayerStore(Path(resume), identity)
        by_block = by_block or weights is not None
        if by_block:
            check_by_block(plan, model, weights is not None)
        shares = by_block and not changes_in_place(plan, model)
        own = with_same_tensors(model) if shares else copy.deepcopy(model)
        work = Work(own.eval(), data, plan, keep_best, strict, offload, store)
        report = PTQReport(recipe=plan.name)
        for i, step in enumerate(plan.steps):
            bar.at(i, len(plan.steps), f"ptq: {step.step}")
            if store is not None:
                store.step = i
            began = time.perf_counter()
            whole = work.model  # the float one, before it is quantized
            record = carry_out(step, work)
            record.seconds = time.perf_counter() - began
            report.steps.append(record)
            _check_changed(record, isinstance(recipe, str))
            if isinstance(step, QuantizeStep):
                _list_floats(work, report, strict)
                if by_block:
                    _blocks(work, whole, i, weights, offload, report, bar)
                    break
            if step.step in ("quantize", "awq", "low_rank"):
                work.originals = _weights(work.model)
        if by_block:
            for record in report.steps[i + 1 :]:
                _check_changed(record, isinstance(recipe, str))
        else:
            report.layers = layer_records(work)
            report.sqnr = output_sqnr(model, work.model, data)
        report.seconds = time.perf_counter() - start
    return work.model, report


def _check_changed(record: StepRecord, built_in: bool) -> None:
    """Warn about a step that did nothing."""
    # a built-in recipe also serves models without norms to fold, and single layers
    absent = built_in and set(record.skipped) <= {""} and record.step in _FOLDING
    if not record.changed and not absent:
        text = "; ".join(f"{n or 'the model'}: {why}" for n, why in record.skipped.items())
        warnings.warn(
            f"ptq: {record.step} changed nothing{': ' + text if text else ''}",
            UserWarning,
            stacklevel=3,
        )


def _blocks(
    work: Work,
    whole: nn.Module,
    place: int,
    weights: Any,
    offload: bool | str | Path,
    report: PTQReport,
    bar: Bar,
) -> None:
    """All steps behind ``quantize``, block by block."""
    source = None if weights is None else WeightSource(weights)
    blocks = plan_of(whole, work.model, work.batches, source is not None)

    def tell(done: int, count: int) -> None:
        bar.at(done, count, "ptq: blocks")

    later = list(enumerate(work.recipe.steps))[place + 1 :]
    tensors: dict[str, Tensor] = dict(whole.named_parameters(remove_duplicate=False))
    tensors |= dict(whole.named_buffers(remove_duplicate=False))
    device = device_of(work.recipe)
    ByBlock(work, blocks, later, tensors, source, offload, tell, device).run(report)


def _weights(model: nn.Module) -> dict[str, Any]:
    """Copies of the float weights of quantized layers, by the layers' names."""
    found = {}
    for name, module in model.named_modules():
        if "weight_quant" in module._modules and module._parameters.get("weight") is not None:
            found[name] = module._parameters["weight"].detach().clone()  # type: ignore[union-attr]
    return found


def _list_floats(work: Work, report: PTQReport, strict: bool) -> None:
    conversion = work.conversion
    for entry in (*conversion.unsupported, *conversion.kept):
        report.float_layers[entry.name or "the model"] = entry.reason or "as a rule says"
    products = []
    for f in conversion.float_functions:
        report.float_layers[f"{f.function} in {f.module or 'the model'}, {f.place}"] = f.reason
        if f.function in PRODUCTS:
            products.append(f"{f.function} in {f.module or 'the model'}, {f.place}")
    if strict and products:
        raise ValueError(f"ptq: strict=True, and these stay float: {'; '.join(products)}")


@contextmanager
def _own_random_numbers(model: nn.Module, plan: Recipe) -> Iterator[None]:
    """Random numbers by the recipe's seed, torch's own generators as they were afterwards."""
    used = [p.device for p in model.parameters()]
    device = device_of(plan)
    if device is not None:
        used.append(device)
    devices = sorted({d.index or 0 for d in used if d.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(plan.seed)
        yield
