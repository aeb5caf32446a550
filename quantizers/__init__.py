"""Predefined quantizers, and the building blocks to make more of them."""

from qframework.quantizers.base import *  # noqa: F403
from qframework.quantizers.binary import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst
from qframework.quantizers.fixed_point import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFixedPointMinMaxInit,
    Int8BiasPerTensorFixedPointInternalScaling,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFixedPointMaxInit,
)
from qframework.quantizers.none import NoneActQuant, NoneBiasQuant, NoneWeightQuant
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatBatchQuant1d,
    Int8ActPerTensorFloatBatchQuant2d,
    Int8ActPerTensorFloatMinMaxInit,
    Int8Bias,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Int16Bias,
    Int24Bias,
    Int32Bias,
    IntBias,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatBatchQuant1d,
    Uint8ActPerTensorFloatBatchQuant2d,
    Uint8ActPerTensorFloatMaxInit,
)
from qframework.quantizers.shifted_scaled_int import (
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerTensorFloat,
)
from qframework.quantizers.solver import ActQuantSolver, BiasQuantSolver, QuantSolver, WeightQuantSolver
from qframework.quantizers.ternary import (
    SignedTernaryActPerTensorConst,
    SignedTernaryWeightPerTensorConst,
)
