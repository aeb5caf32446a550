"""qframework: quantization research in PyTorch, by declarative quantizers."""

from typing import TYPE_CHECKING, Any

from qframework.configuration import settings

if TYPE_CHECKING:
    from qframework.proxy.freezing import freeze, frozen, quant_inference_mode, unfreeze

__all__ = ["freeze", "frozen", "quant_inference_mode", "settings", "unfreeze"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # When first asked for: what quantizers mean can be imported without how they run fast.
    if name in __all__:
        from qframework.proxy import freezing

        found = globals()[name] = getattr(freezing, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
