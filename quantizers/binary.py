"""One bit: -s and s."""

from __future__ import annotations

from qframework.core.binary import ClampedBinaryQuant
from qframework.core.function_wrapper import TensorClamp, TensorClampSte
from qframework.quantizers.base import SignedBinaryClampedConst
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "SignedBinaryActPerTensorConst",
    "SignedBinaryWeightPerTensorConst",
]


class SignedBinaryWeightPerTensorConst(SignedBinaryClampedConst, WeightQuantSolver):
    """Weights -0.1 and 0.1 by default (``scaling_const``); the gradient passes everywhere."""

    tensor_quant = ClampedBinaryQuant
    scaling_const = 0.1
    tensor_clamp_impl = TensorClampSte


class SignedBinaryActPerTensorConst(SignedBinaryClampedConst, ActQuantSolver):
    """Activations -1 and 1 by default (``min_val``, ``max_val``); no gradient outside."""

    min_val = -1.0
    max_val = 1.0
    tensor_clamp_impl = TensorClamp
