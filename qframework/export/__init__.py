"""From a trained model to other runtimes and files, with the same integers, and the proof of it.

Names are loaded when they are first asked for, so that the package needs no runtime until one is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qframework.export.compressed_tensors import export_compressed_tensors
    from qframework.export.errors import CheckpointError, ExportError, Obstacle
    from qframework.export.integer_program import IntegerModel, integer_model
    from qframework.export.obstacles import check_export
    from qframework.export.onnx_export import export_onnx_qcdq, export_qonnx
    from qframework.export.report import Report, Row
    from qframework.export.save import save_quantized
    from qframework.export.torch_qcdq import export_torch_qcdq
    from qframework.export.verification import verify

#: From a name to the module that has it. What builds layers stands on the top floor, and is only offered here.
_WHERE = {
    "CheckpointError": "qframework.export.errors",
    "ExportError": "qframework.export.errors",
    "IntegerModel": "qframework.export.integer_program",
    "Obstacle": "qframework.export.errors",
    "Report": "qframework.export.report",
    "Row": "qframework.export.report",
    "check_export": "qframework.export.obstacles",
    "export_compressed_tensors": "qframework.export.compressed_tensors",
    "export_onnx_qcdq": "qframework.export.onnx_export",
    "export_qonnx": "qframework.export.onnx_export",
    "export_torch_qcdq": "qframework.export.torch_qcdq",
    "integer_model": "qframework.export.integer_program",
    "load_quantized": "qframework.graph.load_quantized",
    "save_quantized": "qframework.export.save",
    "verify": "qframework.export.verification",
}
#: Packages of the extra, as their modules are called.
_EXTRA = ("onnx", "safetensors")

__all__ = [
    "CheckpointError",
    "ExportError",
    "IntegerModel",
    "Obstacle",
    "Report",
    "Row",
    "check_export",
    "export_compressed_tensors",
    "export_onnx_qcdq",
    "export_qonnx",
    "export_torch_qcdq",
    "integer_model",
    "load_quantized",
    "save_quantized",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = globals()[name] = getattr(import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(_EXTRA):
            raise
        raise ModuleNotFoundError(
            f"{name} needs the package {error.name}: pip install 'qframework[export]'",
            name=error.name,
        ) from error
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
