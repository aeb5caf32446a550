"""One call for what the contexts do layer by layer."""

from __future__ import annotations

from typing import Any, TypeVar

from qframework.graph.batches import Batches

Mode = TypeVar("Mode", bound=Any)


def quantize_in_order(mode: Mode, batches: Any) -> Mode:
    """Run a layer-by-layer context over all layers.

    Args:
        mode: not yet entered.
        batches: see :class:`~qframework.graph.batches.Batches`.
    """
    data = Batches(batches)
    with mode as run:
        for _ in range(run.num_layers):
            data.run(run.model)
            run.update()
    return mode
