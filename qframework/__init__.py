"""qframework: quantization research in PyTorch, by declarative quantizers."""

from qframework.configuration import settings

__all__ = ["settings"]
__version__ = "0.1.0"
