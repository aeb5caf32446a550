"""The proof: an export computes the integers that the model's evaluation does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qframework.arguments import check_module
from qframework.export.constants import Constants
from qframework.export.errors import ExportError, refuse
from qframework.export.explaining import Explanation
from qframework.export.integer_program import IntegerModel
from qframework.export.obstacles import DEFAULT_OPSET, check_export
from qframework.export.program import trace
from qframework.export.report import LATER, TIE, WRONG, Report, Row
from qframework.export.session import Call, Session
from qframework.export.targets import (
    NEEDS,
    Results,
    is_installed,
    load,
    run_integer,
    run_onnx,
    run_torch,
)
from qframework.functional import power_below

#: Steps by which what should be an integer may be off: float32's rounding of its value.
_OFF = 1e-3


def verify(
    model: nn.Module,
    args: Any,
    against: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset_version: int | None = None,
) -> Report:
    """Compare a model's evaluation with its exports, layer by layer, in integer steps.

    Each target is exported and run: ``"integer"`` (:func:`~qframework.export.integer_model`), ``"torch"``
    (:func:`~qframework.export.export_torch_qcdq`), ``"onnxruntime"`` (:func:`~qframework.export.export_onnx_qcdq`) and ``"qonnx"``
    (:func:`~qframework.export.export_qonnx`). onnxruntime runs with its optimizations, but those that replace our integers by its
    own: ``session.disable_quant_qdq=1``, without ``DoubleQDQPairsRemover``; its defaults have rows of their own.

    Args:
        model: with quantized layers, calibrated; afterwards it is as it was.
        args: positional arguments of a run, a tuple or one tensor.
        against: a target or several; the path of an .onnx file, or a ``ModelProto``; None for all that are installed.
        kwargs: keyword arguments of a run.
        opset_version: of the file for onnxruntime; the least that holds the model where None.

    Returns:
        The report; ``report.exact`` and ``report.explained`` say what came out.

    Raises:
        ExportError: a target that was asked for can't hold the model, or a file can't be read or run.
        ValueError: an unknown target.
        ModuleNotFoundError: a target that was asked for isn't installed.
    """
    check_module(model, "verify")
    refuse("verify", check_export(model, "integer"))
    session = Session(model, args, kwargs, keep_values=True)
    comparison = _Comparison(session)
    chosen = list(NEEDS) if against is None else _as_list(against)
    for target in chosen:
        if not isinstance(target, str) or target not in NEEDS:
            name, proto = _file(target)
            comparison.add(name, run_onnx(session, proto))
        elif against is None and not is_installed(target):
            comparison.report.skipped[target] = f"{NEEDS[target]} is not installed"
        else:
            try:
                comparison.add(target, _results(target, comparison, opset_version))
            except ExportError as error:
                if against is not None:
                    raise
                comparison.report.skipped[target] = " ".join(str(error).split())[:300]
    return comparison.report


def _as_list(against: Any) -> Sequence[Any]:
    return list(against) if isinstance(against, (list, tuple)) else [against]


def _file(target: Any) -> tuple[str, Any]:
    if hasattr(target, "graph"):
        return "ModelProto", target
    if isinstance(target, os.PathLike) or (isinstance(target, str) and target.endswith(".onnx")):
        return os.path.basename(os.fspath(target)), load(target)
    allowed = ", ".join(map(repr, NEEDS))
    raise ValueError(
        f"against={target!r}; allowed are {allowed}, the path of an .onnx file, or a ModelProto"
    )


def _results(target: str, comparison: _Comparison, opset_version: int | None) -> Results:
    session = comparison.session
    if target == "integer":
        return run_integer(session, comparison.program)
    if target == "torch":
        refuse("torch QCDQ", check_export(session.model, "torch_qcdq"))
        return run_torch(session)
    from qframework.export.onnx_export import found_by_run, in_float64
    from qframework.export.onnx_file import onnx_model
    from qframework.export.qcdq import QCDQ
    from qframework.export.qonnx import QONNX

    if target == "qonnx":
        refuse("QONNX", [*check_export(session.model, "qonnx"), *in_float64(session)])
        proto = onnx_model(session, QONNX(), DEFAULT_OPSET, program=comparison.program)
        return run_onnx(session, proto)
    opset = opset_version or DEFAULT_OPSET
    obstacles = check_export(session.model, "onnx_qcdq", opset)
    if obstacles and opset_version is None:
        opset = 21
        obstacles = check_export(session.model, "onnx_qcdq", opset)
    refuse("ONNX QCDQ", [*obstacles, *found_by_run(session)])
    return run_onnx(session, onnx_model(session, QCDQ(opset), opset, program=comparison.program))


class _Comparison:
    """A report in the making.

    Args:
        session: with the values of the evaluation.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.report = session, Report()
        self.program = trace(session)
        self._own: Explanation | None = None
        self._steps: list[Tensor | None] | None = None

    @property
    def own(self) -> Explanation:
        """The explanation of the evaluation's own results."""
        if self._own is None:
            self._own = Explanation(self.program, self.session, {}).run()
        return self._own

    @property
    def output_steps(self) -> list[Tensor | None]:
        """The step of each output's grid; None where it has none."""
        if self._steps is None:
            model = IntegerModel(self.program, self.session)
            model(*self.session.args, **self.session.kwargs)
            self._steps = self._of_tensors(model.output_scales)
        return self._steps

    def _of_tensors(self, outputs: list[Any]) -> list[Any]:
        """Those of outputs that are tensors: a model may return None, too."""
        leaves = pytree.tree_leaves(self.session.output)
        pairs = zip(outputs, leaves, strict=True)
        return [o for o, leaf in pairs if isinstance(leaf, Tensor)]

    def _outputs_of(self, explanation: Explanation) -> list[Any]:
        return self._of_tensors(explanation.outputs)

    def add(self, target: str, results: Results) -> None:
        """Compare the results of a target."""
        masks = self._differences(results)
        outputs = self._outputs(results.outputs)
        theirs: Explanation | None = None
        if any(bool(m.any()) for m, _ in masks.values()) or any(
            step is None or bool(mask.any()) for mask, _, step in outputs
        ):
            theirs = Explanation(self.program, self.session, results.values).run()
        rows = self._parameter_rows(target, results)
        slots: dict[str, list[Call]] = {}
        for call in self.session.order:
            if call.name in masks:
                slots.setdefault(call.slot.name, []).append(call)
        ordered = sorted(slots.values(), key=lambda calls: not calls[0].constants.is_parameter)
        for calls in ordered:
            rows.append(self._row(target, calls, masks, theirs))
        rows += self._output_rows(target, results.outputs, theirs, rows)
        self.report.rows += rows
        if results.without is not None:
            again = self._output_rows(target, results.without, theirs, rows, "output alone")
            self.report.rows += [r for r in again if r.differing]
        if results.defaults is not None:
            name = f"{target} (defaults)"
            self.report.apart += self._output_rows(name, results.defaults, None, rows)

    # ------------------------------------------------------------ quantizers

    def _differences(self, results: Results) -> dict[str, tuple[Tensor, float]]:
        """For each call where it differs, and by how many steps at most."""
        found = {}
        for call in self.session.order:
            theirs = results.values.get(call.name)
            if theirs is not None and call.value is not None:
                found[call.name] = _difference(call.constants, call.value, theirs)
        return found

    def _row(
        self,
        target: str,
        calls: list[Call],
        masks: dict[str, tuple[Tensor, float]],
        theirs: Explanation | None,
    ) -> Row:
        slot = calls[0].slot
        elements = sum(masks[c.name][0].numel() for c in calls)
        differing = sum(int(masks[c.name][0].sum()) for c in calls)
        largest = max(masks[c.name][1] for c in calls)
        cause, good = "", True
        if differing:
            good = all(self._is_explained(c, masks[c.name][0], theirs) for c in calls)
            cause = TIE if good else WRONG
        return Row(target, slot.layer, slot.tensor, elements, differing, largest, cause, good)

    def _is_explained(self, call: Call, mask: Tensor, theirs: Explanation | None) -> bool:
        if not bool(mask.any()):
            return True
        if call.constants.is_parameter or theirs is None:
            return False
        both = (theirs.right.get(call.name), self.own.right.get(call.name))
        return all(m is not None and bool(m[mask].all()) for m in both)

    def _parameter_rows(self, target: str, results: Results) -> list[Row]:
        own = dict(self.session.model.named_parameters()) | dict(self.session.model.named_buffers())
        rows = []
        for name, theirs in results.parameters.items():
            mine = own[name].detach().to(theirs.dtype).cpu()
            mask = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
            count = int(mask.sum())
            layer, _, tensor = name.rpartition(".")
            largest = float((mine.double() - theirs.double()).abs().max()) if count else 0.0
            cause = WRONG if count else ""
            rows.append(Row(target, layer, tensor, mask.numel(), count, largest, cause, not count))
        return rows

    # ------------------------------------------------------------ outputs

    def _outputs(self, theirs: list[Tensor]) -> list[tuple[Tensor, float, Tensor | None]]:
        """For each output where it differs in steps of its grid, by how many at most, and the step."""
        mine = [t for t in pytree.tree_leaves(self.session.output) if isinstance(t, Tensor)]
        if len(mine) != len(theirs):
            raise ExportError(f"the model has {len(mine)} outputs, the target {len(theirs)}")
        found: list[tuple[Tensor, float, Tensor | None]] = []
        for own, other, step in zip(mine, theirs, self.output_steps, strict=True):
            if own.shape != other.shape:
                raise ExportError(
                    f"an output has shape {tuple(own.shape)}, in the target {tuple(other.shape)}"
                )
            if not own.is_floating_point():
                mask = own != other
                found.append((mask, float(mask.any()), torch.ones(())))
                continue
            away = (own.double() - other.double()).abs().nan_to_num(0.0)
            if step is None:
                found.append((torch.zeros_like(own, dtype=torch.bool), 0.0, None))
                continue
            steps = (away / step).round()
            found.append((steps > 0, float(steps.max()) if steps.numel() else 0.0, step))
        return found

    def _output_rows(
        self,
        target: str,
        outputs: list[Tensor],
        theirs: Explanation | None,
        before: list[Row],
        name: str = "output",
    ) -> list[Row]:
        rows, compared = [], self._outputs(outputs)
        mine = [t for t in pytree.tree_leaves(self.session.output) if isinstance(t, Tensor)]
        for i, (mask, largest, step) in enumerate(compared):
            label = name if len(compared) == 1 else f"{name} {i}"
            good = True
            if step is None:
                mask, largest, good = self._float_output(i, mine[i], outputs[i], theirs)
            elif bool(mask.any()):
                good = theirs is not None and all(
                    bool(_within(self._outputs_of(e)[i], t)[mask].all())
                    for e, t in ((theirs, outputs[i]), (self.own, mine[i]))
                )
            count = int(mask.sum())
            later = any(r.differing for r in before)
            cause = "" if not count else (LATER if later else TIE) if good else WRONG
            if theirs is None and count:
                cause = "it requantizes in its own way"
            rows.append(Row(target, "", label, mask.numel(), count, largest, cause, good))
        return rows

    def _float_output(
        self, i: int, mine: Tensor, other: Tensor, theirs: Explanation | None
    ) -> tuple[Tensor, float, bool]:
        """An output without a grid: where it differs by more than rounding errors of both runs."""
        own = self._outputs_of(self.own)[i]
        away = (mine.double() - other.double()).abs().nan_to_num(0.0)
        bound = own.error + (own.error if theirs is None else self._outputs_of(theirs)[i].error)
        mask = away > bound.clamp_min(1e-30)
        largest = float((away / bound.clamp_min(1e-30)).max()) if away.numel() else 0.0
        good = theirs is None or bool(_within(self._outputs_of(theirs)[i], other)[mask].all())
        return mask, largest, good


def _difference(c: Constants, mine: Tensor, theirs: Tensor) -> tuple[Tensor, float]:
    """Where two values of a quantizer differ, and by how many steps at most."""
    if mine.shape != theirs.shape:
        raise ExportError(
            f"{c.slot} has shape {tuple(mine.shape)}, in the target {tuple(theirs.shape)}"
        )
    mine, theirs = mine.double(), theirs.double()
    step = c.spread(c.scale).double()
    if c.format == "minifloat":
        assert c.minifloat is not None
        smallest = 2.0 ** (1 - c.minifloat.exponent_bias)
        power = power_below((mine / step).abs().clamp_min(smallest).nan_to_num(smallest))
        step = step * power * 2.0**-c.minifloat.mantissa_bits
    away = (mine - theirs).abs() / step
    allowed = _OFF + 2.0**-21 * (mine / step).abs()
    if c.dtype in (torch.float16, torch.bfloat16):
        allowed = allowed + torch.finfo(c.dtype).eps * (mine / step).abs()
    mask = (away > allowed) | (mine.isnan() != theirs.isnan())
    largest = float(away[mask].nan_to_num(0.0).max()) if bool(mask.any()) else 0.0
    return mask, largest


def _within(bounded: Any, value: Tensor) -> Tensor:
    """Where a value is within the bound of a number."""
    if not hasattr(bounded, "error"):
        return (
            bounded == value
            if isinstance(bounded, Tensor)
            else torch.ones_like(value, dtype=torch.bool)
        )
    away: Tensor = (bounded.value - value.double()).abs()
    u = 2.0**-24 if value.dtype is not torch.float64 else 2.0**-52
    bound: Tensor = bounded.error + u * bounded.value.abs()
    return away <= bound
