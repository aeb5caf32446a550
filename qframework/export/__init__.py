"""From a trained model to files: every name is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qframework.export.compressed_tensors import export_compressed_tensors
    from qframework.export.errors import CheckpointError
    from qframework.export.save import save_quantized

#: Where each name is. What builds layers stands on the top floor, and is only offered here.
_PLACES = {
    "CheckpointError": "qframework.export.errors",
    "export_compressed_tensors": "qframework.export.compressed_tensors",
    "load_quantized": "qframework.graph.load_quantized",
    "save_quantized": "qframework.export.save",
}

__all__ = ["CheckpointError", "export_compressed_tensors", "load_quantized", "save_quantized"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
