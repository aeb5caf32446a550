"""qframework: quantization research in PyTorch, by declarative quantizers."""

from qframework.configuration import settings
from qframework.proxy.freezing import freeze, frozen, quant_inference_mode, unfreeze
from qframework.proxy.state_dict import load_state_dict

__all__ = ["freeze", "frozen", "load_state_dict", "quant_inference_mode", "settings", "unfreeze"]
__version__ = "0.1.0"
