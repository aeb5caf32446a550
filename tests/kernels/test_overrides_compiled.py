"""Whatever a user overrides of a quantizer's parts counts in compiled layers, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from ways_to_override import WAYS, named_parts, part_at, public_methods

import qframework

QUICK = "weight_absmax"


def by_compiled(kind: str, layer: Any, x: torch.Tensor) -> Any:
    """What the layer gives, traced by the compiler anew."""
    torch.compiler.reset()
    return torch.compile(by_layer, backend="eager")(kind, layer, x)


def _cases() -> Any:
    for kind in KINDS:
        for path, part in named_parts(proxy_of(kind, layer_of(kind)).tensor_quant):
            for name in public_methods(part):
                marks = pytest.mark.slow if kind == QUICK else pytest.mark.exhaustive
                label = f"{kind}-{path or 'quantizer'}.{name}"
                yield pytest.param(kind, path, name, id=label, marks=marks)


@pytest.mark.table(4)
@pytest.mark.parametrize(("kind", "path", "name"), list(_cases()))
def test_what_is_overridden_counts_in_compiled_layers(kind: str, path: str, name: str) -> None:
    layer = layer_of(kind)
    snapshot = Snapshot(layer)
    phase = KINDS[kind].phases[-1 if len(KINDS[kind].phases) == 1 else 1]
    with WAYS["subclass"](part_at(proxy_of(kind, layer).tensor_quant, path), name):
        with qframework.settings.use(kernels="reference"):
            composed = outcome(kind, layer, phase, by_parts, snapshot)
        compiled = outcome(kind, layer, phase, by_compiled, snapshot)
    assert difference(compiled, composed) is None, difference(compiled, composed)
