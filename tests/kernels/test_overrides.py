"""Whatever a user overrides of a quantizer's parts counts, whichever form would run otherwise."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from quantizer_kinds import (
    KINDS,
    Snapshot,
    by_layer,
    by_parts,
    difference,
    layer_of,
    outcome,
    proxy_of,
)
from ways_to_override import WAYS, named_parts, part_at, public_methods, ways_for

import qframework
from qframework.kernels.native import tensors

QUICK = "weight_absmax"
SETTINGS = ("auto", "fused", "reference")


@pytest.fixture(autouse=True)
def _tensors_of_any_size_are_for_native_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SMALLEST", 1)


@cache
def shared(kind: str) -> tuple[Any, Snapshot]:
    """A layer for all cases of a kind, which has its plan from calls before they override anything."""
    layer = layer_of(kind)
    snapshot = Snapshot(layer)
    for phase in KINDS[kind].phases:
        outcome(kind, layer, phase, by_layer, snapshot)
    return layer, snapshot


@cache
def untouched(kind: str, phase: str) -> Any:
    """What the parts give that nobody has overridden anything of."""
    with qframework.settings.use(kernels="reference"):
        return outcome(kind, *_run(kind, phase, by_parts))


def _run(kind: str, phase: str, quantize: Any) -> tuple[Any, ...]:
    layer, snapshot = shared(kind)
    return layer, phase, quantize, snapshot


def _cases() -> Any:
    for kind, (_, _, _, phases) in KINDS.items():
        quantizer = proxy_of(kind, layer_of(kind)).tensor_quant
        for path, part in named_parts(quantizer):
            for name in public_methods(part):
                for way in ways_for(part, name):
                    label = f"{kind}-{path or 'quantizer'}.{name}-{way}"
                    marks = () if kind == QUICK else pytest.mark.slow
                    yield pytest.param(kind, path, name, way, phases, id=label, marks=marks)


@pytest.mark.table(8)
@pytest.mark.parametrize(("kind", "path", "name", "way", "phases"), list(_cases()))
def test_what_is_overridden_counts_and_no_longer_once_it_is_removed(
    kind: str, path: str, name: str, way: str, phases: tuple[str, ...]
) -> None:
    for phase in phases:
        check(kind, path, name, way, phase)


def check(kind: str, path: str, name: str, way: str, phase: str) -> None:
    plain = untouched(kind, phase)
    layer, _ = shared(kind)
    found = {}
    with WAYS[way](part_at(proxy_of(kind, layer).tensor_quant, path), name):
        with qframework.settings.use(kernels="reference"):
            composed = outcome(kind, *_run(kind, phase, by_parts))
        for kernels in SETTINGS:
            with qframework.settings.use(kernels=kernels):
                found[kernels] = outcome(kind, *_run(kind, phase, by_layer))
    matters = difference(composed, plain) is not None
    for kernels, got in found.items():
        assert difference(got, composed) is None, f"{phase}, {kernels}: {difference(got, composed)}"
        assert (difference(got, plain) is not None) == matters, f"{phase}, {kernels}"
    assert difference(outcome(kind, *_run(kind, phase, by_layer)), plain) is None, (
        f"{phase}: removed"
    )
