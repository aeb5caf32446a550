"""No quantization: what a layer uses where it is given None."""

from __future__ import annotations

from qframework.inject.enum import QuantType
from qframework.quantizers.solver import ActQuantSolver, BiasQuantSolver, WeightQuantSolver
from qframework.quantizers.trunc_solver import TruncQuantSolver

__all__ = [
    "NoneActQuant",
    "NoneBiasQuant",
    "NoneTruncQuant",
    "NoneWeightQuant",
]


class NoneWeightQuant(WeightQuantSolver):
    """Weights stay floats."""

    quant_type = QuantType.FP


class NoneActQuant(ActQuantSolver):
    """Activations stay floats."""

    quant_type = QuantType.FP


class NoneBiasQuant(BiasQuantSolver):
    """Biases stay floats."""

    quant_type = QuantType.FP


class NoneTruncQuant(TruncQuantSolver):
    """Accumulators keep their bits."""

    quant_type = QuantType.FP
