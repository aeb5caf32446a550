"""The modules that a layer holds, one for each tensor that it quantizes."""

from qframework.proxy.base import QuantProxy
from qframework.proxy.bias_quant import BiasQuantProxyFromInjector
from qframework.proxy.build import (
    ActQuantType,
    BiasQuantType,
    Quantizer,
    TruncQuantType,
    WeightQuantType,
    build_proxy,
    sharing,
)
from qframework.proxy.codebook_quant import (
    ActCodebookQuantProxyFromInjector,
    WeightCodebookQuantProxyFromInjector,
)
from qframework.proxy.decoupled_quant import (
    DecoupledWeightQuantProxyFromInjector,
    DecoupledWeightQuantWithInputProxyFromInjector,
)
from qframework.proxy.dynamic_quant import DynamicActQuantProxyFromInjector
from qframework.proxy.float_quant import (
    ActFloatQuantProxyFromInjector,
    DynamicActFloatQuantProxyFromInjector,
    WeightFloatQuantProxyFromInjector,
)
from qframework.proxy.groupwise_quant import (
    GroupwiseActFloatQuantProxyFromInjector,
    GroupwiseActQuantProxyFromInjector,
    GroupwiseWeightFloatQuantProxyFromInjector,
    GroupwiseWeightQuantProxyFromInjector,
)
from qframework.proxy.parameter_quant import (
    ParameterQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.proxy.runtime_quant import ActQuantProxyFromInjector
from qframework.proxy.trunc_quant import TruncQuantProxyFromInjector

__all__ = [
    "ActCodebookQuantProxyFromInjector",
    "ActFloatQuantProxyFromInjector",
    "ActQuantProxyFromInjector",
    "ActQuantType",
    "BiasQuantProxyFromInjector",
    "BiasQuantType",
    "DecoupledWeightQuantProxyFromInjector",
    "DecoupledWeightQuantWithInputProxyFromInjector",
    "DynamicActFloatQuantProxyFromInjector",
    "DynamicActQuantProxyFromInjector",
    "GroupwiseActFloatQuantProxyFromInjector",
    "GroupwiseActQuantProxyFromInjector",
    "GroupwiseWeightFloatQuantProxyFromInjector",
    "GroupwiseWeightQuantProxyFromInjector",
    "ParameterQuantProxyFromInjector",
    "QuantProxy",
    "Quantizer",
    "TruncQuantProxyFromInjector",
    "TruncQuantType",
    "WeightCodebookQuantProxyFromInjector",
    "WeightFloatQuantProxyFromInjector",
    "WeightQuantProxyFromInjector",
    "WeightQuantType",
    "build_proxy",
    "sharing",
]
