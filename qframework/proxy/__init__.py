"""The modules that a layer holds, one for each tensor that it quantizes."""

from qframework.proxy.base import QuantProxy
from qframework.proxy.build import build_proxy
from qframework.proxy.decoupled_quant import (
    DecoupledWeightQuantProxyFromInjector,
    DecoupledWeightQuantWithInputProxyFromInjector,
)
from qframework.proxy.dynamic_quant import DynamicActQuantProxyFromInjector
from qframework.proxy.parameter_quant import (
    BiasQuantProxyFromInjector,
    ParameterQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.proxy.runtime_quant import ActQuantProxyFromInjector
from qframework.proxy.trunc_quant import TruncQuantProxyFromInjector

__all__ = [
    "ActQuantProxyFromInjector",
    "BiasQuantProxyFromInjector",
    "DecoupledWeightQuantProxyFromInjector",
    "DecoupledWeightQuantWithInputProxyFromInjector",
    "DynamicActQuantProxyFromInjector",
    "ParameterQuantProxyFromInjector",
    "QuantProxy",
    "TruncQuantProxyFromInjector",
    "WeightQuantProxyFromInjector",
    "build_proxy",
]
