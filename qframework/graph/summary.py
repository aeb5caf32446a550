"""What a model is made of: for each tensor its quantizer, bits, scale and size; for each layer its operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, nn

from qframework.proxy import QuantProxy
from qframework.quant_tensor import IntQuantTensor, QuantTensor

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class TensorSummary(BaseModel):
    """One tensor of a layer.

    Attributes:
        name: ``weight``, ``bias``, ``input``, ``output``, ``act`` and so on.
        quantizer: name of its class; None for floats.
        bit_width: bits of an element.
        granularity: what shares a scale: ``tensor``, ``channel`` or ``group``; None for floats.
        scale_min: smallest scale; None where there is none, or it depends on the input.
        scale_max: largest scale, likewise.
        zero_point: smallest and largest zero point; None where it is 0 throughout.
        parameters: elements that are stored; 0 for activations.
    """

    name: str
    quantizer: str | None
    bit_width: float
    granularity: str | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    zero_point: tuple[float, float] | None = None
    parameters: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size_in_bits(self) -> float:
        """Bits of storage of all elements, without scales."""
        return self.parameters * self.bit_width


class LayerSummary(BaseModel):
    """One layer.

    Attributes:
        name: in the model.
        type: its class.
        tensors: with parameters or quantizers.
        macs: multiply-accumulates for the given input; None without one, 0 where there are none.
        weight_bits: bits of its weight; None where it has none.
        input_bits: bits of its input, 32 for floats; None without an input.
    """

    name: str
    type: str
    tensors: list[TensorSummary]
    macs: int | None = None
    weight_bits: float | None = None
    input_bits: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bops(self) -> float | None:
        """Bit operations: ``macs`` times bits of the weight times bits of the input."""
        if self.macs is None or self.input_bits is None or self.weight_bits is None:
            return None
        return self.macs * self.weight_bits * self.input_bits


class ModelSummary(BaseModel):
    """A model; prints as a table.

    Attributes:
        layers: those with parameters or quantizers, in order.
    """

    model_config = ConfigDict(frozen=True)
    layers: list[LayerSummary]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def parameters(self) -> int:
        """Number of all parameters of layers."""
        return sum(t.parameters for x in self.layers for t in x.tensors)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size_in_bits(self) -> float:
        """Bits of storage of them, without scales."""
        return sum(t.size_in_bits for x in self.layers for t in x.tensors)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all layers; None without an input."""
        known = [x.macs for x in self.layers if x.macs is not None]
        return sum(known) if known else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bops(self) -> float | None:
        """Bit operations of all layers; None without an input."""
        known = [x.bops for x in self.layers if x.bops is not None]
        return sum(known) if known else None

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(title="Summary", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shifted = any(t.zero_point for x in self.layers for t in x.tensors)
        for heading in ("layer", "tensor", "quantizer", "per"):
            table.add_column(heading, overflow="fold", min_width=6)
        numbers = (
            "bits",
            "scale",
            *(["zero"] if shifted else []),
            "params",
            "size",
            "MACs",
            "BOPs",
        )
        for heading in numbers:
            table.add_column(heading, justify="right", no_wrap=heading != "scale", overflow="fold")
        for layer in self.layers:
            heading = f"{layer.name} {layer.type}"
            if not layer.tensors:
                counts = (_large(layer.macs), _large(layer.bops))
                table.add_row(heading, *[""] * (len(numbers) + 1), *counts)
            for i, t in enumerate(layer.tensors):
                first = i == 0
                zero = "" if t.zero_point is None else _span(*t.zero_point)
                table.add_row(
                    heading if first else "",
                    t.name,
                    t.quantizer or "float",
                    t.granularity or "",
                    f"{t.bit_width:g}",
                    _span(t.scale_min, t.scale_max),
                    *([zero] if shifted else []),
                    _large(t.parameters),
                    _large(t.size_in_bits),
                    _large(layer.macs) if first else "",
                    _large(layer.bops) if first else "",
                )
            table.add_section()
        totals = [_large(n) for n in (self.parameters, self.size_in_bits, self.macs, self.bops)]
        table.add_row("total", *[""] * (len(numbers) - 1), *totals)
        return table


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{low:.2g}" if low == high else f"{low:.2g}..{high:.2g}"


def _large(number: float | None) -> str:
    """Three digits and a unit."""
    if not number:
        return ""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def summary(model: nn.Module, *example_input: Any) -> ModelSummary:
    """What a model is made of.

    Nothing of the model changes: the example runs in evaluation mode, without gradients.

    Args:
        model: quantized, float or both.
        *example_input: arguments for the model, one sample of which gives multiply-accumulates and bit operations.
            Those of linear layers, convolutions, recurrent layers and of the projections of attention are
            counted. The bits of an input are known where it is a quantized tensor, was made by a quantized layer and
            passed through modules that keep elements, or is quantized by the layer itself; else it counts as 32.

    Returns:
        Layers and tensors as data (``.model_dump()``, ``.model_dump_json()``), which rich prints as a table.
    """
    counts: dict[str, tuple[int, float]] = {}
    if example_input:
        counts = _counted(model, example_input)
    layers = []
    for name, module in model.named_modules():
        tensors = list(_tensors(module))
        if tensors or name in counts:
            macs, bits = counts.get(name, (None, None))
            layers.append(
                LayerSummary(
                    name=name or "(the model)",
                    type=type(module).__name__,
                    tensors=tensors,
                    macs=macs,
                    weight_bits=_weight_bits(module),
                    input_bits=bits,
                )
            )
    return ModelSummary(layers=layers)


def _weight_bits(module: nn.Module) -> float | None:
    """Bits of a layer's weight, of the first for one that is made of several."""
    for part in module.modules():
        proxy = part._modules.get("weight_quant")
        if isinstance(proxy, QuantProxy) and proxy.is_quant_enabled:
            return _bits(proxy)
    weight = next((p for n, p in module.named_parameters() if "weight" in n), None)
    return None if weight is None else float(torch.finfo(weight.dtype).bits)


# ------------------------------------------------------------ tensors


def _tensors(module: nn.Module) -> Iterator[TensorSummary]:
    if isinstance(module, QuantProxy) or _inside_quantizer(module):
        return
    quantized = set()
    for attribute, proxy in module._modules.items():
        if isinstance(proxy, QuantProxy):
            role = attribute.removesuffix("_quant")
            parameter = module._parameters.get(role)
            if proxy.tensor_quant is not None and not proxy.disable_quant:
                quantized.add(role)
                yield _quantized(role, proxy, 0 if parameter is None else parameter.numel())
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in quantized:
            bits = torch.finfo(parameter.dtype).bits
            yield TensorSummary(
                name=name, quantizer=None, bit_width=bits, parameters=parameter.numel()
            )


def _inside_quantizer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("qframework.core")


def _quantized(role: str, proxy: Any, parameters: int) -> TensorSummary:
    scale, zero_point = _asked(proxy, "scale"), _asked(proxy, "zero_point")
    low, high = (None, None) if scale is None else _ends(scale)
    shifted = None
    if zero_point is not None and bool(zero_point.any()):
        shifted = _ends(zero_point)
    rows = {row.name: row.value.strip("'") for row in proxy.explain().rows}
    return TensorSummary(
        name=role,
        quantizer=proxy.quantizer.__name__,
        bit_width=_bits(proxy),
        granularity="row"
        if rows.get("scaling_per_row") == "True"
        else rows.get("scaling_per_output_type", "tensor"),
        scale_min=low,
        scale_max=high,
        zero_point=shifted,
        parameters=parameters,
    )


def _ends(t: Tensor) -> tuple[float, float]:
    return float(t.detach().min()), float(t.detach().max())


@torch.no_grad()
def _asked(proxy: Any, what: str) -> Any:
    """What a proxy tells, None where it depends on an input."""
    try:
        return getattr(proxy, what)()
    except RuntimeError:
        return None


def _bits(proxy: Any) -> float:
    codebook = getattr(proxy, "codebook", None)
    if codebook is not None:
        return float(math.ceil(math.log2(codebook().numel())))
    if hasattr(proxy, "mantissa_bit_width"):
        exponent, mantissa = proxy.exponent_bit_width(), proxy.mantissa_bit_width()
        return float(exponent + mantissa) + bool(proxy.is_signed)
    found = _asked(proxy, "bit_width")
    if found is None:
        width = proxy.tensor_quant.msb_clamp_bit_width_impl
        found = width()
    return float(found)


# ------------------------------------------------------------ operations


#: Modules that keep the bits of what they are given.
_KEEPING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.UpsamplingNearest2d,
)  # fmt: skip


def _counted(model: nn.Module, example_input: tuple[Any, ...]) -> dict[str, tuple[int, float]]:
    """For each leaf layer its multiply-accumulates and the bits of its input."""
    names = {m: n for n, m in model.named_modules()}
    counts: dict[str, tuple[int, float]] = {}
    known: dict[int, tuple[Any, float]] = {}  # kept alive with its bits, since an id may come again

    def bits_of(x: Any) -> float | None:
        if isinstance(x, IntQuantTensor):
            return float(x.bit_width)
        return known[id(x)][1] if id(x) in known else None

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        bits = bits_of(given)
        own = getattr(module, "input_quant", getattr(module, "io_quant", None))
        if isinstance(own, QuantProxy) and own.is_quant_enabled:
            bits = _bits(own)
        macs = _macs(module, given, output)
        if macs is not None:
            before = counts.get(names[module], (0, 0.0))[0]
            counts[names[module]] = (before + macs, 32.0 if bits is None else bits)
        made = None
        for attribute in ("output_quant", "act_quant", "trunc_quant"):
            proxy = module._modules.get(attribute)
            if isinstance(proxy, QuantProxy) and proxy.is_quant_enabled:
                made = _bits(proxy)
        if made is None and isinstance(module, _KEEPING):
            made = bits
        if made is not None and isinstance(output, (Tensor, QuantTensor)):
            known[id(output)] = (output, made)

    modes = {m: m.training for m in model.modules()}
    outer = [
        m for m in model.modules() if not isinstance(m, QuantProxy) and not _inside_quantizer(m)
    ]
    handles = [m.register_forward_hook(look) for m in outer]
    try:
        model.eval()
        with torch.no_grad():
            model(*example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return counts


def _macs(module: nn.Module, given: Any, output: Any) -> int | None:
    """Multiply-accumulates of a layer; None for those that aren't counted."""
    if isinstance(module, nn.Linear):
        return int(output.numel()) * module.in_features
    if isinstance(module, _CONVOLUTIONS):
        return int(output.numel()) * math.prod(module.weight.shape[1:])
    if isinstance(module, _TRANSPOSED):
        return int(given.numel()) * math.prod(module.weight.shape[1:])
    if isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        steps = given.numel() // given.shape[-1]
        return int(steps) * sum(p.numel() for n, p in module.named_parameters() if "weight" in n)
    if hasattr(module, "direction_class"):
        steps = given.numel() // given.shape[-1]
        weights = (p.numel() for n, p in module.named_parameters() if n.endswith("_weight.weight"))
        return int(steps) * sum(weights)
    return None
