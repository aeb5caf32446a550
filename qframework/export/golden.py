"""Golden vectors: the integers of one call of an integer model, in files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qframework.export.integers import Integers

if TYPE_CHECKING:
    from qframework.export.integer_program import IntegerModel

#: Version of the manifest.
_VERSION = 1


def write(model: IntegerModel, folder: str | os.PathLike[str], c_header: bool) -> Path:
    """Write a manifest and a file for each tensor.

    Args:
        model: after a call.
        folder: made where it isn't there.
        c_header: write C arrays, too.

    Returns:
        The path of the manifest.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    entries, arrays = [], []
    for entry, array in _entries(model):
        entry["file"] = f"{_file_name(entry['name'])}.npy"
        entry["shape"], entry["dtype"] = list(array.shape), str(array.dtype)
        np.save(path / entry["file"], array, allow_pickle=False)
        entries.append(entry)
        arrays.append((entry, array))
    manifest = {
        "version": _VERSION,
        "value": "(code - zero_point) * scale",
        "rounding": "half to even, unless a tensor says otherwise; then clamped to [low, high]",
        "functions_in_float64": model.functions,
        "tensors": entries,
    }
    target = path / "manifest.json"
    target.write_text(json.dumps(manifest, indent=1) + "\n")
    if c_header:
        (path / "golden.h").write_text(_header(arrays))
    return target


def _entries(model: IntegerModel) -> list[tuple[dict[str, Any], Any]]:
    found: list[tuple[dict[str, Any], Any]] = []
    for i, t in enumerate(pytree.tree_leaves(model.given)):
        if isinstance(t, Tensor):
            found.append(({"name": f"input{i}", "role": "input"}, t.detach().cpu().numpy()))
    for name, (call, integers) in model.kept.items():
        if call is not None:
            found.append(_of_quantizer(name, call.constants, integers, model))
        else:
            codes = integers.codes
            entry = {"name": name, "role": "accumulator", **_grid(integers)}
            found.append((entry, codes.numpy()))
    for i, t in enumerate(model.outputs):
        if isinstance(t, Tensor):
            found.append(({"name": f"output{i}", "role": "output"}, t.numpy()))
    return found


def _grid(integers: Integers) -> dict[str, Any]:
    scale, zero = integers.scale, integers.zero
    low, high = (
        (int(f) for f in (integers.codes.min(), integers.codes.max()))
        if integers.codes.numel()
        else (0, 0)
    )
    bits = max((-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1
    return {
        "bits": bits,
        "signed": True,
        "scale": _numbers(scale),
        "zero_point": _numbers(zero),
    }


def _numbers(t: Tensor) -> Any:
    """A number, or a list of the shape that broadcasts."""
    return t.item() if t.numel() == 1 else t.tolist()


def _of_quantizer(
    name: str, c: Any, integers: Integers | None, model: IntegerModel
) -> tuple[dict[str, Any], Any]:
    entry = {
        "name": name,
        "role": c.role,
        "format": c.format,
        "bits": c.bits,
        "signed": c.signed,
        "scale": _numbers(c.spread(c.scale).double()),
        "zero_point": _numbers(c.spread(c.zero_point).double()),
    }
    if c.format == "minifloat":
        entry |= {
            "exponent_bits": c.exponent_bits,
            "mantissa_bits": c.minifloat.mantissa_bits,
            "exponent_bias": c.minifloat.exponent_bias,
        }
        return entry, model.floats[name].numpy()
    entry |= {"low": c.low, "high": c.high, "rounding": c.rounding}
    if c.format == "ternary":
        entry["threshold"] = c.threshold
    if c.truncates is not None:
        divisor, scale, zero_point, bits = c.truncates
        entry["truncates"] = {
            "divisor": _numbers(divisor.double()),
            "input_scale": _numbers(scale.double()),
            "input_zero_point": _numbers(zero_point.double()),
            "input_bits": bits,
        }
    return entry, _narrow(model.trace[name], c.low, c.high)


def _narrow(codes: Tensor, low: int, high: int) -> Any:
    """Codes in the narrowest dtype."""
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return codes.to(dtype).numpy()
    return codes.numpy()


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


#: C types of numpy's.
_C_TYPES = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float32": "float",
    "float64": "double",
}


def _c_number(v: float) -> str:
    text = repr(v)
    return {"inf": "INFINITY", "-inf": "-INFINITY", "nan": "NAN"}.get(text, text)


def _header(arrays: list[tuple[dict[str, Any], Any]]) -> str:
    lines = ["#ifndef GOLDEN_H", "#define GOLDEN_H", "#include <math.h>", "#include <stdint.h>", ""]
    for entry, array in arrays:
        if str(array.dtype) not in _C_TYPES or array.size == 0:
            continue
        identifier = re.sub(r"\W", "_", entry["name"])
        shape = "x".join(map(str, array.shape)) or "1"
        lines.append(f"/* {entry['name']}: {entry['role']}, {shape} */")
        values = ", ".join(map(_c_number, array.reshape(-1).tolist()))
        kind = _C_TYPES[str(array.dtype)]
        lines += [f"static const {kind} {identifier}[{array.size}] = {{{values}}};", ""]
    return "\n".join([*lines, "#endif", ""])
