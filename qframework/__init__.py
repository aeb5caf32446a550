"""qframework: quantization research in PyTorch, by declarative quantizers."""

from typing import TYPE_CHECKING, Any

from qframework.configuration import settings

if TYPE_CHECKING:
    from qframework.proxy.freezing import freeze, frozen, quant_inference_mode, unfreeze
    from qframework.proxy.state_dict import load_state_dict

__all__ = ["freeze", "frozen", "load_state_dict", "quant_inference_mode", "settings", "unfreeze"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # When first asked for: what quantizers mean can be imported without how they run fast.
    if name in __all__:
        from qframework.proxy import freezing, state_dict

        module = state_dict if name == "load_state_dict" else freezing
        found = globals()[name] = getattr(module, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
