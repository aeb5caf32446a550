"""What is probably wrong with a quantized model, and what to do about it."""

from __future__ import annotations

from pydantic import BaseModel
from torch import nn

from qframework.arguments import check_module
from qframework.inspect.places import WHOLE
from qframework.inspect.statistics import ModelStatistics, TensorStatistics
from qframework.proxy import QuantProxy


class Finding(BaseModel):
    """One warning.

    Attributes:
        layer: name of the layer.
        tensor: of it; empty for the layer as a whole.
        kind: ``"dead quantizer"``, ``"saturation"``, ``"unused codes"``, ``"scale not trained"``, ``"not calibrated"``,
            ``"float layer"``,
            ``"float input"`` or ``"not reached"``.
        message: what was found.
        remedy: what to do.
    """

    layer: str
    tensor: str
    kind: str
    message: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.layer}.{self.tensor}" if self.tensor else self.layer
        return f"{place}: {self.message}. {self.remedy}"


#: Share of values beyond the grid from which there is a warning.
SATURATION = 0.01
#: Share of codes in use below which there is one, where there were enough values.
UNUSED = 0.25

_MULTIPLYING = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNN,
    nn.LSTM, nn.GRU, nn.MultiheadAttention, nn.Embedding,
)  # fmt: skip


def findings(model: nn.Module, statistics: ModelStatistics) -> list[Finding]:
    """Warnings with remedies.

    Args:
        model: that was looked at.
        statistics: from :func:`~qframework.inspect.collect_statistics`, with a ``loss`` to find scales that aren't trained.

    Returns:
        Those of tensors in their order, then those of layers.
    """
    check_module(model, "findings")
    found = [f for t in statistics.tensors for f in _of_tensor(t)]
    for name in statistics.not_reached:
        layer, _, tensor = name.rpartition(".")
        found.append(
            Finding(
                layer=layer,
                tensor=tensor,
                kind="not reached",
                message="no value passed this quantizer: its tensor is read past it",
                remedy="Call the layer itself rather than a function with its weight, or remove the quantizer",
            )
        )
    for name in statistics.float_inputs:
        found.append(
            Finding(
                layer=name,
                tensor="input",
                kind="float input",
                message="its weight is quantized and its input isn't: the activation is read past its quantizer",
                remedy="Give it input_quant=Int8ActPerTensorFloat, or quantize the activation in front of it",
            )
        )
    inner = {p for m in model.modules() if isinstance(m, QuantProxy) for p in m.modules()}
    for name, module in model.named_modules():
        if module in inner or not isinstance(module, _MULTIPLYING):
            continue
        if any(m.is_quant_enabled for m in module.modules() if isinstance(m, QuantProxy)):
            continue
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        found.append(
            Finding(
                layer=name or WHOLE,
                tensor="",
                kind="float layer",
                message=f"this {type(module).__name__} is left in float",
                remedy="quantize_model replaces it; a rule with keep_float=True or a disabled quantizer may be why it is float",
            )
        )
    return found


def _of_tensor(t: TensorStatistics) -> list[Finding]:
    def finding(kind: str, message: str, remedy: str) -> Finding:
        return Finding(layer=t.layer, tensor=t.tensor, kind=kind, message=message, remedy=remedy)

    if not t.calibrated:
        message = "evaluated before calibration: its scale is a placeholder"
        remedy = (
            "Run batches under calibration_mode(model) or in training mode, or load a state dict"
        )
        return [finding("not calibrated", message, remedy)]
    found = []
    if t.not_finite:
        message = f"{t.not_finite:.2%} of its values are NaN or infinite"
        found.append(
            finding("dead quantizer", message, "detect_anomaly(model) names where it begins")
        )
    occupied = [c for c in t.histogram.counts if c]
    if t.codes_used == 1 and len(occupied) > 1:
        message = "dead quantizer: all values become one code"
        remedy = "Its scale is far too large: calibrate again, use a percentile, or more bits"
        found.append(finding("dead quantizer", message, remedy))
    elif t.codes and t.codes_used and t.sampled >= 16 * t.codes and t.codes_used / t.codes < UNUSED:
        message = f"{t.codes_used} of {t.codes} codes are used"
        remedy = "Fewer bits would do, or a smaller scale: a percentile or MSE statistic, or scales per channel"
        found.append(finding("unused codes", message, remedy))
    if t.saturated > SATURATION:
        ends = f"{t.clipped_low:.2%} below, {t.clipped_high:.2%} above"
        message = f"{t.saturated:.2%} of its values are beyond its range by more than a step (clipped: {ends})"
        remedy = (
            "Calibrate on more data or with a higher percentile, learn the scale, or use more bits"
        )
        found.append(finding("saturation", message, remedy))
    if t.scale_gradient is not None and not any(t.scale_gradient):
        message = "its learned scale has no gradient: it isn't trained"
        remedy = (
            "See that the loss depends on this layer and that it isn't under no_grad or detached"
        )
        found.append(finding("scale not trained", message, remedy))
    return found
