"""What a file of tensors holds, without the model that it is of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qframework.export.recipe import Recipe, read_recipe
from qframework.graph.table import Table

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
}
_BITS |= {
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor.

    Attributes:
        name: in the model, for packed weights; else in the file.
        kind: dtype in the file, or how many bits packed codes have.
        quantizer: that made its codes; empty for others.
        shape: of the tensor, of the weight where it is packed.
        elements: how many there are.
        bits: in the file, all elements together.
    """

    name: str
    kind: str
    quantizer: str
    shape: tuple[int, ...]
    elements: int
    bits: int


def read_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, or of a folder that ``save_quantized`` wrote.

    Only the header of the file is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file; a broken recipe beside it is a CheckpointError.
    """
    from safetensors import SafetensorError, safe_open

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    beside = file.parent / "recipe.json"
    recipe = read_recipe(beside.read_bytes()) if beside.is_file() else None
    try:
        with safe_open(str(file), framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return [_stored(name, s, recipe) for name, s in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file: {error}") from None


def _stored(name: str, found: Any, recipe: Recipe | None) -> StoredTensor:
    shape, dtype = tuple(found.get_shape()), str(found.get_dtype())
    elements = math.prod(shape)
    bits = elements * _BITS.get(dtype, 8)
    weight = None if recipe is None else recipe.weights.get(name.removesuffix(".codes"))
    if recipe is None or weight is None or not name.endswith(".codes"):
        return StoredTensor(name, dtype.lower(), "", shape, elements, bits)
    quantizer = str(recipe.quantizers[weight.quantizer].quantizer.get("of", "one of its own"))
    own, count = name.removesuffix(".codes"), math.prod(weight.shape)
    return StoredTensor(own, f"{weight.bits} bits", quantizer, tuple(weight.shape), count, bits)


def table(tensors: list[StoredTensor]) -> Table:
    """A row for each tensor and one of totals."""
    rows = [
        [t.name, t.kind, t.quantizer, "x".join(map(str, t.shape)), f"{t.elements:,}", f"{t.bits / 8:,.0f}"]
        for t in tensors
    ]  # fmt: skip
    elements, size = sum(t.elements for t in tensors), sum(t.bits for t in tensors)
    rows.append(["total", "", "", "", f"{elements:,}", f"{size / 8:,.0f}"])
    headings = ["tensor", "stored as", "quantizer", "shape", "elements", "bytes"]
    return Table("Checkpoint", headings, rows, 4, total=True)
