"""qframework: quantization research in PyTorch, by declarative quantizers."""

__version__ = "0.1.0"
