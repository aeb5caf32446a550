"""Makes layers/keywords.py from the policy: ``python tests/layers/keywords_text.py`` writes it."""

from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Union, get_args, get_origin

import qframework.quantizers.solver as solvers
from qframework.inject.policy import Policy

PLACE = Path(__file__).parents[2] / "layers" / "keywords.py"
#: The class for each prefix.
CLASSES = {
    "weight_": "WeightKeywords",
    "bias_": "BiasKeywords",
    "input_": "InputKeywords",
    "output_": "OutputKeywords",
    "act_": "PrefixedActKeywords",
    "": "ActKeywords",
}
HEAD = '''"""The keywords of layers, for type checkers and editors: policies and parts of each quantizer, by prefix.

Made by ``python tests/layers/keywords_text.py`` from :class:`qframework.inject.policy.Policy`, where each is explained. At run
time further names are taken: whatever a quantizer class binds.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import nn

from qframework.inject.enum import (
'''
TAIL = '''
class WeightLayerKeywords(WeightKeywords, BiasKeywords, InputKeywords, OutputKeywords, total=False):
    """Of layers with a weight, a bias, an input and an output to quantize."""


class ActLayerKeywords(ActKeywords, PrefixedActKeywords, InputKeywords, total=False):
    """Of activation functions; those of the result go with the prefix ``act_`` or without."""
'''


def policies() -> dict[str, Any]:
    return {name: field.annotation for name, field in Policy.model_fields.items()}


def parts() -> list[str]:
    found = {
        name
        for solver in vars(solvers).values()
        if hasattr(solver, "__bindings__")
        for name in solver.__bindings__
        if name.endswith("_impl")
    }
    return sorted(found)


def type_text(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return type_text(get_args(annotation)[0])
    if get_origin(annotation) is Union:
        return " | ".join(type_text(a) for a in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"tuple[{type_text(get_args(annotation)[0])}, ...]"
    if annotation is NoneType:
        return "None"
    name: str = annotation.__name__
    return f"{name}Name" if issubclass(annotation, Enum) else name


def text() -> str:
    enums = sorted(
        {a for a in policies().values() if isinstance(a, type) and issubclass(a, Enum)},
        key=lambda e: e.__name__,
    )
    lines = [HEAD + "".join(f"    {e.__name__},\n" for e in enums) + ")\n"]
    for enum in enums:
        names = ", ".join(f'"{m.value}"' for m in enum)
        line = f"{enum.__name__}Name = {enum.__name__} | Literal[{names}]"
        if len(line) > 100:
            names = "".join(f'    "{m.value}",\n' for m in enum)
            line = f"{enum.__name__}Name = (\n    {enum.__name__}\n    | Literal[\n"
            line += "".join(f'        "{m.value}",\n' for m in enum) + "    ]\n)"
        lines.append(line)
    lines.append("Part = nn.Module | type[nn.Module]\n")
    for prefix, name in CLASSES.items():
        what = f"with the prefix ``{prefix}``" if prefix else "without a prefix"
        lines.append(f"\nclass {name}(TypedDict, total=False):")
        lines.append(f'    """Keywords {what}."""\n')
        lines += [f"    {prefix}{policy}: {type_text(a)}" for policy, a in policies().items()]
        lines += [f"    {prefix}{part}: Part" for part in parts()]
        lines.append("")
    return "\n".join(lines) + TAIL


if __name__ == "__main__":
    PLACE.write_text(text())
