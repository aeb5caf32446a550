"""Recipes by name."""

from __future__ import annotations

import difflib
from typing import Any

from qframework.graph.recipe import Layers, Recipe


def _recipe(
    name: str, weight_bits: int, steps: list[str], act_bits: int = 8, **more: Any
) -> Recipe:
    keywords = {
        "weight_quant": "Int8WeightPerChannelFloatMSE",
        "weight_bit_width": weight_bits,
        "input_quant": "Int8ActPerTensorFloat",
        "input_bit_width": act_bits,
        "act_quant": None,
        **more,
    }
    made: Any = [{"step": s} for s in steps]
    return Recipe(name=name, layers=Layers(keywords=keywords), steps=made)


def built_in_recipes() -> dict[str, Recipe]:
    """The recipes that :func:`~qframework.graph.ptq` knows by name."""
    start = ["merge_batch_norm", "quantize", "calibrate"]
    absmax: dict[str, Any] = {"weight_quant": "Int8WeightPerChannelFloat"}
    found = [
        _recipe("w8a8", 8, start, **absmax),
        _recipe(
            "w8a8-equalized", 8, ["merge_batch_norm", "equalize", "quantize", "calibrate", "bias_correction"],
            weight_quant="Int8WeightPerTensorFloat",
        ),
        _recipe("w8a8-smoothquant", 8, ["merge_batch_norm", "activation_equalize", *start[1:]], **absmax),
    ]  # fmt: skip
    for bits in (3, 4):
        found += [
            _recipe(f"w{bits}a8", bits, [*start, "bias_correction"]),
            _recipe(f"w{bits}a8-gptq", bits, [*start, "gptq", "bias_correction"]),
            _recipe(f"w{bits}a8-gpfq", bits, [*start, "gpfq"]),
            _recipe(f"w{bits}a8-qronos", bits, [*start, "qronos"]),
            _recipe(f"w{bits}a8-adaround", bits, [*start, "learned_round"]),
            _recipe(
                f"w{bits}a8-awq",
                bits,
                ["merge_batch_norm", "quantize", "awq", "calibrate"],
                **absmax,
            ),
        ]
    found.append(_recipe("w4a4-gpfq", 4, [*start, "gpfq"], act_bits=4))
    rotated = ["merge_ln_affine", "layer_norm_to_rms", "rotate"]
    found.append(_recipe("w4a8-rotated-gptq", 4, [*rotated, *start[1:], "gptq"]))
    return {r.name: r for r in found}


def find_recipe(recipe: Any) -> Recipe:
    """A recipe by its name, as a dict, or as it is.

    Raises:
        ValueError: an unknown name, or a recipe that can't be.
        TypeError: anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        known = built_in_recipes()
        if recipe not in known:
            close = difflib.get_close_matches(recipe, known, n=3, cutoff=0.3)
            hint = f" Near names: {', '.join(close)}." if close else ""
            raise ValueError(
                f"ptq: no recipe {recipe!r}.{hint} All: {', '.join(known)}; "
                "for a file, Recipe.model_validate_json(path.read_text())"
            )
        return known[recipe]
    if isinstance(recipe, dict):
        return Recipe.model_validate(recipe)
    raise TypeError(f"ptq: recipe must be a Recipe, a name or a dict, got {type(recipe).__name__}")
