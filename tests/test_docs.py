"""Every Python block of README and docs runs, one after the other in each file."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What one can derive from, each with tests of its own in the page.
RECIPES = ("new_quantizer", "new_format", "new_layer")
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # what Lightning uses of torch
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    for match in BLOCK.finditer(text):
        needed = re.search(r"needs=(\w+)", match[1])
        if "no-run" in match[1] or (needed and find_spec(needed[1]) is None):
            continue
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[2], str(page), "exec"), space)


@pytest.mark.parametrize(
    ("page", "writer"),
    [
        ("PAGE", "policies"),
        ("CATALOGUE", "catalogue"),
        ("MIGRATION", "migration"),
        ("REFERENCE", "reference"),
        ("LLMS", "llms"),
    ],
)
def test_generated_pages_are_those_of_the_classes(page, writer) -> None:
    space: dict[str, object] = {
        "__file__": str(ROOT / "docs" / "generate.py"),
        "__name__": "generate",
    }
    exec((ROOT / "docs" / "generate.py").read_text(), space)
    assert space[page].read_text() == space[writer](), "run python docs/generate.py"


def test_every_promise_is_held_by_the_test_that_it_names() -> None:
    page = ROOT / "docs" / "guarantees.md"
    promises = [line for line in page.read_text().splitlines() if line.startswith("- ")]
    links = re.findall(r"\[`(\w+)`\]\(([^)]+)\)$", "\n".join(promises), re.MULTILINE)
    assert len(links) == len(promises) > 20
    for name, path in links:
        assert f"def {name}(" in (page.parent / path).read_text(), (name, path)


def _recipes() -> dict[str, type]:
    found = {}
    for name in RECIPES:
        module = ModuleType(f"page_{name}")
        sys.modules[module.__name__] = module  # pickles look for it
        space = vars(module)
        for match in BLOCK.finditer((ROOT / "docs" / f"{name}.md").read_text()):
            exec(match[2], space)
        found |= {n: v for n, v in space.items() if n.startswith("Test") and isinstance(v, type)}
    return found


#: Each recipe keeps the contract that it shows.
globals().update(_recipes())
