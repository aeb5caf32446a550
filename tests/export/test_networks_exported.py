"""All kinds of networks, in all targets: how many integers differ from the evaluation."""

from __future__ import annotations

import pytest
import torch
from zoo import BITS, GRIDS, NETS, WITH_FUNCTIONS, build, data

from qframework.export import verify
from qframework.export.report import Report

#: Integers of an output that are compared.
COUNT = 10_000
#: One grid and width for each kind, so that each of them occurs; the whole table is exhaustive.
EVERY_DAY = [
    (name, list(GRIDS)[i % len(GRIDS)], BITS[i % len(BITS)]) for i, name in enumerate(NETS)
]
WHOLE = [(n, g, b) for n in NETS for g in GRIDS for b in BITS]


def compared(name: str, grids: str, bits: int) -> Report:
    model, _ = build(name, grids, bits)
    kind = NETS[name]
    with torch.no_grad():
        each = model(data(kind, 2)).numel() // 2
    torch.manual_seed(1)
    return verify(model, data(kind, -(-COUNT // each)))


def assert_same(report: Report, name: str, grids: str) -> None:
    assert set(report.targets) >= {"integer", "torch", "onnxruntime"}, report
    assert report.explained, report
    if GRIDS[grids].powers and name not in WITH_FUNCTIONS:
        assert report.exact, report
    for target in report.targets:
        rows = [r for r in report.rows if r.target == target]
        assert sum(r.elements for r in rows if r.tensor.startswith("output")) >= COUNT
        first = next((r for r in rows if r.differing), None)
        if first is not None:  # later ones differ by what follows from it, too
            assert first.differing <= max(first.elements * 0.001, 1), report
            assert first.largest < 1.05, report


@pytest.mark.slow
@pytest.mark.table(2)
@pytest.mark.parametrize(
    ("name", "grids", "bits"),
    # the layer of an LSTM is exported in all forms in test_layers_exported.py
    [pytest.param(*c, marks=pytest.mark.exhaustive if c[0] == "LSTM" else ()) for c in EVERY_DAY],
)
def test_every_kind_of_network_gives_the_same_integers(name: str, grids: str, bits: int) -> None:
    assert_same(compared(name, grids, bits), name, grids)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "grids", "bits"), WHOLE)
def test_the_whole_table(name: str, grids: str, bits: int) -> None:
    assert_same(compared(name, grids, bits), name, grids)
