"""What a model is made of: for each tensor its quantizer, bits, scale and size; for each layer its operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.accumulators import accumulator_width, bias_integers
from qframework.graph.operations import Operations, count_operations
from qframework.graph.table import Table, Tabled
from qframework.graph.widths import asked, bits_of_proxy, bits_of_tensor, inside_quantizers
from qframework.proxy import QuantProxy


class TensorSummary(BaseModel):
    """One tensor of a layer.

    Attributes:
        name: ``weight``, ``bias``, ``input``, ``output``, ``act`` and so on.
        quantizer: name of its class; None for floats.
        bit_width: bits of an element.
        granularity: what shares a scale: ``tensor``, ``channel`` or ``group``; None for floats.
        scale_min: smallest scale; None where there is none, or it depends on the input.
        scale_max: largest scale; None where there is none, or it depends on the input.
        zero_point: smallest and largest zero point; None where it is 0 throughout.
        parameters: elements that are stored; 0 for activations, and where another tensor is the same parameter.
        shared_with: that other tensor, ``layer.name``, which comes first; None for most.
        integers: of a quantized bias, one for each channel; None for others, and where its scale is that of an input and neither the
            example nor a forward pass has given one.
    """

    name: str
    quantizer: str | None
    bit_width: float
    granularity: str | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    zero_point: tuple[float, float] | None = None
    parameters: int = 0
    shared_with: str | None = None
    integers: list[int] | None = None

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
        macs: multiply-accumulates for the given input, of all calls; None without one, and for layers without.
        bops: bit operations: the sum of multiply-accumulates times the bits of both factors; None where ``macs`` is.
        weight_bits: bits of its weight, the mean over multiply-accumulates where there are several; in products of
            activations, such as those of attention, bits of the second one. None where it has none.
        input_bits: bits of its input, 32 for floats, the mean over multiply-accumulates; None without an input.
        accumulator_bits: bits of the integers that its sums of products, with an integer bias, need in the worst case; None where
            input or weight aren't integers, or the input isn't known.
    """

    name: str
    type: str
    tensors: list[TensorSummary]
    macs: int | None = None
    bops: float | None = None
    weight_bits: float | None = None
    input_bits: float | None = None
    accumulator_bits: int | None = None


class ModelSummary(Tabled):
    """A model; ``print`` and rich show a table.

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

    def table(self) -> Table:
        """A row for each tensor; the last one is that of totals."""
        shifted = any(t.zero_point for x in self.layers for t in x.tensors)
        counted = any(t.integers for x in self.layers for t in x.tensors)
        summed = any(x.accumulator_bits for x in self.layers)
        zeros = ["zero"] if shifted else []
        headings = ["layer", "tensor", "quantizer", "per", "bits", "scale", *zeros]
        headings += ["integers"] * counted + ["acc. bits"] * summed
        headings += ["params", "size", "MACs", "BOPs"]
        rows = []
        for layer in self.layers:
            heading = f"{layer.name} {layer.type}"
            widths = [str(layer.accumulator_bits or "")] * summed
            counts = [_large(layer.macs), _large(layer.bops)]
            if not layer.tensors:
                empty = [""] * (len(headings) - 5 - len(widths))
                rows.append([heading, *empty, *widths, "", "", *counts])
            for i, t in enumerate(layer.tensors):
                zero = "" if t.zero_point is None else _span(*t.zero_point)
                whole = f"{min(t.integers)}..{max(t.integers)}" if t.integers else ""
                rows.append(
                    [
                        heading if i == 0 else "",
                        t.name if t.shared_with is None else f"{t.name} = {t.shared_with}",
                        t.quantizer or "float",
                        t.granularity or "",
                        f"{t.bit_width:g}",
                        _span(t.scale_min, t.scale_max),
                        *([zero] if shifted else []),
                        *([whole] if counted else []),
                        *(widths if i == 0 else [""] * summed),
                        _large(t.parameters),
                        _large(t.size_in_bits),
                        *(counts if i == 0 else ["", ""]),
                    ]
                )
        totals = [_large(n) for n in (self.parameters, self.size_in_bits, self.macs, self.bops)]
        rows.append(["total", *[""] * (len(headings) - 5), *totals])
        return Table("Summary", headings, rows, _TEXT_COLUMNS, total=True)

    def to_csv(self) -> str:
        """A line for each tensor, with the numbers of its layer; bias integers are separated by blanks."""
        of_layer = [n for n in LayerSummary.model_fields if n not in ("name", "tensors")]
        of_tensor = [n for n in TensorSummary.model_fields if n != "name"]
        rows = []
        for layer in self.layers:
            mine = [_cell(getattr(layer, n)) for n in of_layer]
            for t in layer.tensors:
                rest = [_cell(getattr(t, n)) for n in of_tensor]
                rows.append([layer.name, t.name, *mine, *rest, _cell(t.size_in_bits)])
            if not layer.tensors:
                rows.append([layer.name, "", *mine, *[""] * (len(of_tensor) + 1)])
        headings = ["layer", "tensor", *of_layer, *of_tensor, "size_in_bits"]
        return Table("", headings, rows).to_csv()


#: Columns of words; the others hold numbers.
_TEXT_COLUMNS = 4


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


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

    Nothing of the model changes: the example runs in evaluation mode, without gradients. A model on the meta device has
    all numbers but scales and zero points.

    Args:
        model: quantized, float or both.
        *example_input: arguments for the model, one sample of which gives multiply-accumulates and bit operations.
            Those of modules are counted: linear layers, convolutions, recurrent layers, attention (projections and
            products of activations) and ``QuantMatMul``; calls of functions like ``torch.matmul`` are not. The bits
            of an input are known where it is a quantized tensor, was made by a quantized layer and passed through
            modules that keep elements, or is quantized by the layer itself; else it counts as 32.

    Returns:
        Layers and tensors as data (``to_dict``, ``to_json``, ``to_csv``), which print as a table: in aligned text by ``print``, in
        colours by rich's ``print``.
    """
    check_module(model, "summary")
    counts = count_operations(model, example_input) if example_input else {}
    inner = inside_quantizers(model)
    seen: dict[Tensor, str] = {}
    layers = []
    for name, module in model.named_modules():
        if module in inner:
            continue
        shown = name or "(the model)"
        tensors = list(_tensors(shown, module, seen))
        if tensors or module in counts:
            found = counts.get(module, Operations())
            for t in tensors:
                if t.name == "bias" and t.quantizer is not None:
                    t.integers = found.bias_integers or bias_integers(module)
            weight_bits = next((t.bit_width for t in tensors if t.name == "weight"), None)
            layers.append(
                LayerSummary(
                    name=shown,
                    type=type(module).__name__,
                    tensors=tensors,
                    macs=found.macs,
                    bops=found.bops,
                    weight_bits=weight_bits if found.macs is None else found.weight_bits,
                    input_bits=found.input_bits,
                    accumulator_bits=accumulator_width(module, found.input_codes),
                )
            )
    return ModelSummary(layers=layers)


def _tensors(layer: str, module: nn.Module, seen: dict[Tensor, str]) -> Iterator[TensorSummary]:
    def stored(role: str, parameter: Tensor | None) -> dict[str, Any]:
        if parameter is None:
            return {}
        first = seen.setdefault(parameter, f"{layer}.{role}")
        if first != f"{layer}.{role}":
            return {"shared_with": first}
        return {"parameters": parameter.numel()}

    quantized = set()
    for attribute, proxy in module._modules.items():
        if isinstance(proxy, QuantProxy):
            role = attribute.removesuffix("_quant")
            if proxy.tensor_quant is not None and not proxy.disable_quant:
                quantized.add(role)
                yield _quantized(role, proxy, stored(role, module._parameters.get(role)))
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in quantized:
            bits = bits_of_tensor(parameter)
            yield TensorSummary(
                name=name, quantizer=None, bit_width=bits, **stored(name, parameter)
            )


def _quantized(role: str, proxy: Any, stored: dict[str, Any]) -> TensorSummary:
    scale, zero_point = asked(proxy, "scale"), asked(proxy, "zero_point")
    low, high = (None, None) if scale is None or scale.is_meta else _ends(scale)
    shifted = None
    if zero_point is not None and not zero_point.is_meta and bool(zero_point.any()):
        shifted = _ends(zero_point)
    rows = {row.name: row.value.strip("'") for row in proxy.explain().rows}
    return TensorSummary(
        name=role,
        quantizer=proxy.quantizer.__name__,
        bit_width=bits_of_proxy(proxy),
        granularity="row"
        if rows.get("scaling_per_row") == "True"
        else rows.get("scaling_per_output_type", "tensor"),
        scale_min=low,
        scale_max=high,
        zero_point=shifted,
        **stored,
    )


def _ends(t: Tensor) -> tuple[float, float]:
    return float(t.detach().min()), float(t.detach().max())
