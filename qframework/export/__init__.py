"""From a trained model to other runtimes, with the same integers, and the proof of it.

Names are loaded when they are first asked for, so that the package needs no runtime until one is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qframework.export.errors import ExportError, Obstacle
    from qframework.export.integer_program import IntegerModel, integer_model
    from qframework.export.obstacles import check_export
    from qframework.export.onnx_export import export_onnx_qcdq, export_qonnx
    from qframework.export.report import Report, Row
    from qframework.export.torch_qcdq import export_torch_qcdq
    from qframework.export.verification import verify

#: From a name to the module that has it.
_WHERE = {
    "ExportError": "errors",
    "IntegerModel": "integer_program",
    "Obstacle": "errors",
    "Report": "report",
    "Row": "report",
    "check_export": "obstacles",
    "export_onnx_qcdq": "onnx_export",
    "export_qonnx": "onnx_export",
    "export_torch_qcdq": "torch_qcdq",
    "integer_model": "integer_program",
    "verify": "verification",
}

__all__ = [
    "ExportError",
    "IntegerModel",
    "Obstacle",
    "Report",
    "Row",
    "check_export",
    "export_onnx_qcdq",
    "export_qonnx",
    "export_torch_qcdq",
    "integer_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        try:
            module = import_module(f"{__name__}.{_WHERE[name]}")
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("onnx"):
                raise
            raise ModuleNotFoundError(
                f"{name} needs the package {error.name}: pip install 'qframework[export]'",
                name=error.name,
            ) from error
        found = globals()[name] = getattr(module, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
