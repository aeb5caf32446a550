"""Recipes: what becomes of a float model, as data that can be kept in a file."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

import qframework.quantizers
from qframework.graph.conversion_rule import Rule


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRule(_Data):
    """What becomes of some layers, see :class:`~qframework.graph.Rule`.

    Attributes:
        match: names of modules with ``*`` and ``?``, or several.
        keep_float: leave them alone.
        keywords: for the quantized layer; quantizers by their names.
    """

    match: str | list[str]
    keep_float: bool = False
    keywords: dict[str, Any] = Field(default_factory=dict)

    def rule(self) -> Rule:
        """As :func:`~qframework.graph.quantize_model` takes it."""
        return Rule(
            self.match, keep_float=self.keep_float, **with_quantizers(self.keywords, "a rule")
        )


class Layers(_Data):
    """The quantizers of a model, as :func:`~qframework.graph.quantize_model` takes them.

    Attributes:
        keywords: for all layers, such as ``weight_quant`` (a quantizer's name) and ``weight_bit_width``.
        rules: for some; later ones win.
        first: keywords for the first layer with a weight; None for none.
        last: those for the last one.
        functions: quantize functions that modules call too.
    """

    keywords: dict[str, Any] = Field(default_factory=dict)
    rules: list[LayerRule] = Field(default_factory=list)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    functions: bool = False

    @field_validator("keywords", "first", "last")
    @classmethod
    def _known_quantizers(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        with_quantizers(value or {}, "layers")
        return value

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``quantize_model``."""
        found: dict[str, Any] = {
            **with_quantizers(self.keywords, "layers"),
            "rules": [r.rule() for r in self.rules],
            "functions": self.functions,
        }
        for end in ("first", "last"):
            said = getattr(self, end)
            if said is not None:
                found[end] = with_quantizers(said, end)
        return found


def with_quantizers(keywords: dict[str, Any], where: str) -> dict[str, Any]:
    """Keywords with quantizers in place of their names.

    Raises:
        ValueError: a name that no predefined quantizer has.
    """
    found = dict(keywords)
    for key, value in keywords.items():
        if key.endswith("_quant") and isinstance(value, str):
            quantizer = getattr(qframework.quantizers, value, None)
            if quantizer is None:
                names = [n for n in dir(qframework.quantizers) if n[0].isupper()]
                close = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
                hint = f" Near names: {', '.join(close)}" if close else ""
                raise ValueError(f"{where}: {key}={value!r} is no predefined quantizer.{hint}")
            found[key] = quantizer
    return found


# ------------------------------------------------------------ steps


class FloatStep(_Data):
    """A step on the float model, before ``quantize``."""


class QuantizedStep(_Data):
    """A step on the quantized model, after ``quantize``."""


class MergeBatchNormStep(FloatStep):
    """:class:`~qframework.graph.standardize.MergeBatchNorm`."""

    step: Literal["merge_batch_norm"] = "merge_batch_norm"


class EqualizeStep(FloatStep):
    """:class:`~qframework.graph.equalize.EqualizeGraph`."""

    step: Literal["equalize"] = "equalize"
    iterations: int = Field(10, ge=1)
    threshold: float | None = 0.05
    merge_bias: bool = True
    bias_shrinkage: float | Literal["vaiq"] = "vaiq"
    scale_computation_type: Literal["maxabs", "range"] = "maxabs"


class ActivationEqualizeStep(FloatStep):
    """:class:`~qframework.graph.equalize.activation_equalization_mode`, SmoothQuant."""

    step: Literal["activation_equalize"] = "activation_equalize"
    alpha: float = Field(0.5, ge=0, le=1)
    layerwise: bool = False
    blacklist_layers: list[str] = Field(default_factory=list)


class MergeLnAffineStep(FloatStep):
    """:class:`~qframework.graph.equalize.MergeLnAffine`."""

    step: Literal["merge_ln_affine"] = "merge_ln_affine"


class LayerNormToRMSStep(FloatStep):
    """:class:`~qframework.graph.equalize.LayerNormToRMS`."""

    step: Literal["layer_norm_to_rms"] = "layer_norm_to_rms"


class RotateStep(FloatStep):
    """:class:`~qframework.graph.equalize.GraphRotationEqualization`."""

    step: Literal["rotate"] = "rotate"
    orphan_sink: bool = False
    full_rotation_method: Literal["had", "ort"] = "had"
    blacklist_layers: list[str] = Field(default_factory=list)


class ChannelSplittingStep(FloatStep):
    """:class:`~qframework.graph.channel_splitting.GraphChannelSplitting`."""

    step: Literal["channel_splitting"] = "channel_splitting"
    split_ratio: float = Field(0.02, ge=0, le=1)
    split_input: bool = True


class MagRStep(FloatStep):
    """:class:`~qframework.graph.magr.magr_mode`."""

    step: Literal["magr"] = "magr"
    alpha: float = Field(0.1, ge=0)
    num_steps: int = Field(10, ge=1)


class QuantizeStep(_Data):
    """:func:`~qframework.graph.quantize_model`, as ``layers`` says."""

    step: Literal["quantize"] = "quantize"


class AWQStep(QuantizedStep):
    """:func:`~qframework.graph.awq.awq`."""

    step: Literal["awq"] = "awq"
    grid: int = Field(20, ge=1)
    clip: bool = True


class CalibrateStep(QuantizedStep):
    """:func:`~qframework.graph.calibration_mode`."""

    step: Literal["calibrate"] = "calibrate"


class GPTQStep(QuantizedStep):
    """:func:`~qframework.graph.gptq.gptq`."""

    step: Literal["gptq"] = "gptq"
    act_order: bool = False
    use_quant_activations: bool = True


class GPFQStep(QuantizedStep):
    """:func:`~qframework.graph.gpfq.gpfq`."""

    step: Literal["gpfq"] = "gpfq"
    act_order: bool = False
    use_quant_activations: bool = True


class QronosStep(QuantizedStep):
    """:func:`~qframework.graph.qronos.qronos`."""

    step: Literal["qronos"] = "qronos"
    act_order: bool = False
    use_quant_activations: bool = True


class LearnedRoundStep(QuantizedStep):
    """:func:`~qframework.graph.learned_round.learned_round`."""

    step: Literal["learned_round"] = "learned_round"
    blocks: list[str] | Literal["auto"] | None = None
    method: Literal["adaround", "autoround"] = "adaround"
    steps: int = Field(1000, ge=1)
    lr: float | None = Field(None, gt=0)
    batch_size: int = Field(32, ge=1)


class LowRankStep(QuantizedStep):
    """:class:`~qframework.graph.svd_quant.LayerwiseLowRankCorrection`."""

    step: Literal["low_rank"] = "low_rank"
    rank: int = Field(16, ge=1)
    iters: int = Field(1, ge=1)


class BiasCorrectionStep(QuantizedStep):
    """:func:`~qframework.graph.calibrate.bias_correction_mode`."""

    step: Literal["bias_correction"] = "bias_correction"
    skip_if_no_bias: bool = False


class NormCorrectionStep(QuantizedStep):
    """:func:`~qframework.graph.calibrate.norm_correction_mode`."""

    step: Literal["norm_correction"] = "norm_correction"


Step = Annotated[
    MergeBatchNormStep
    | EqualizeStep
    | ActivationEqualizeStep
    | MergeLnAffineStep
    | LayerNormToRMSStep
    | RotateStep
    | ChannelSplittingStep
    | MagRStep
    | QuantizeStep
    | AWQStep
    | CalibrateStep
    | GPTQStep
    | GPFQStep
    | QronosStep
    | LearnedRoundStep
    | LowRankStep
    | BiasCorrectionStep
    | NormCorrectionStep,
    Field(discriminator="step"),
]

#: Steps that choose the values of weights, after which nothing may change them.
_CHOOSING = ("gptq", "gpfq", "qronos", "learned_round")
#: A step, and one that may not come before it, with the reason.
_NOT_AFTER: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("awq", _CHOOSING, "it changes the weights whose values were chosen"),
    ("awq", ("calibrate", "bias_correction"), "it changes what activations were calibrated on"),
    ("calibrate", ("bias_correction", *_CHOOSING), "the inputs that were used would get another scale"),
    ("merge_batch_norm", ("equalize", "activation_equalize", "magr"), "folding changes the weights that were evened out"),
    ("equalize", ("magr",), "it changes the weights whose largest ones were made smaller"),
    ("low_rank", _CHOOSING, "it quantizes the weights anew"),
    ("layer_norm_to_rms", ("rotate",), "the rotation ended at the layer norms"),
    ("merge_ln_affine", ("rotate",), "the rotation ended at the norms with factors"),
)  # fmt: skip


class Recipe(_Data):
    """What becomes of a float model, step by step; ``Recipe.model_validate_json(text)`` reads one, ``model_dump_json()`` writes it.

    Attributes:
        version: of the format.
        name: for reports.
        layers: which quantizers.
        steps: in order, ``quantize`` among them.
        seed: of all that is drawn.
        device: where statistics are kept, and with ``ptq(..., by_block=True)`` where each block has its turn; None for that of each
            layer.
        dtype: of the arithmetic, ``"float32"`` or ``"float64"``.

    Raises:
        ValidationError: unknown fields, names of quantizers that there aren't, or a step that can't follow another; a ValueError too.
    """

    version: Literal[1] = 1
    name: str = ""
    layers: Layers = Field(default_factory=Layers)
    steps: list[Step]
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        names = [s.step for s in self.steps]
        if names.count("quantize") != 1:
            raise ValueError(
                f"steps: there has to be one 'quantize', not {names.count('quantize')}; float steps come before it, "
                "the others behind"
            )
        place = names.index("quantize")
        for i, step in enumerate(self.steps):
            if isinstance(step, FloatStep) and i > place:
                raise ValueError(
                    f"steps: {step.step!r} works on the float model, before 'quantize'"
                )
            if isinstance(step, QuantizedStep) and i < place:
                raise ValueError(f"steps: {step.step!r} needs quantizers, after 'quantize'")
        for later, earlier, reason in _NOT_AFTER:
            if later in names:
                for other in names[: names.index(later)]:
                    if other in earlier:
                        raise ValueError(f"steps: {later!r} can't come after {other!r}: {reason}")
        chosen = [n for n in names if n in _CHOOSING]
        if len(chosen) > 1:
            raise ValueError(
                f"steps: {chosen[1]!r} can't come after {chosen[0]!r}: the values of the weights are chosen already"
            )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.float64 if self.dtype == "float64" else torch.float32
