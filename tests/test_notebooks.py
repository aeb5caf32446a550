"""The notebook of a first look prints the numbers of the tutorial that it retells; all notebooks run when the site is built."""

import ast
import json
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_look.md"
PRINTED = json.loads((ROOT / "tests" / "data" / "overview_outputs.json").read_text())
CELL = re.compile(r"^```{code-cell}[^\n]*\n((?::[^\n]*\n|\n)*)(.*?)^```", re.MULTILINE | re.DOTALL)


def results() -> dict[str, object]:
    """What each cell with a tag ``printed-N`` shows, in one session."""
    space: dict[str, object] = {}
    found = {}
    for match in CELL.finditer(NOTEBOOK.read_text()):
        tree = ast.parse(match[2])
        last = tree.body.pop()
        exec(compile(tree, str(NOTEBOOK), "exec"), space)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), str(NOTEBOOK), "exec"), space)
            continue
        value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), space)
        if tag := re.search(r"printed-(\d+)", match[1]):
            found[tag[1]] = value
    return found


def agrees(printed: list[str], numbers: torch.Tensor) -> bool:
    """Equal to the digits that are printed, but for one rounding of float32."""
    flat = numbers.detach().double().flatten()
    rounding = 2.0**-24 * flat.abs().max().item()
    units = [10.0 ** -len(p.partition("e")[0].partition(".")[2]) for p in printed]
    units = [u * 10.0 ** int(p.partition("e")[2] or 0) for u, p in zip(units, printed, strict=True)]
    return len(printed) == len(flat) and all(
        abs(float(p) - x) <= 0.5000001 * u + rounding
        for p, u, x in zip(printed, units, flat.tolist(), strict=True)
    )


def test_the_first_look_prints_the_numbers_of_the_tutorial() -> None:
    found = results()
    assert found.keys() == PRINTED.keys()
    for step, value in found.items():
        for field, printed in PRINTED[step].items():
            numbers = value if isinstance(value, torch.Tensor) else getattr(value, field)
            assert agrees(printed, numbers), (step, field)
