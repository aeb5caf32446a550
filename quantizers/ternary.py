"""Three values, -s, 0 and s: by default 2-bit narrow integers with a fixed scale.

With ``quant_type='ternary'`` and a ``threshold`` the dead zone around 0 is set instead of half a step.
"""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import TensorClampSte
from qframework.quantizers.base import NarrowIntQuant, PerTensorConstScaling2bit
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "SignedTernaryActPerTensorConst",
    "SignedTernaryWeightPerTensorConst",
]


class SignedTernaryWeightPerTensorConst(
    NarrowIntQuant, PerTensorConstScaling2bit, WeightQuantSolver
):
    """Weights -0.1, 0 and 0.1 by default (``scaling_const``); the gradient passes everywhere, by a learned scale or width, too."""

    scaling_const = 0.1
    tensor_clamp_impl: Any = TensorClampSte


class SignedTernaryActPerTensorConst(NarrowIntQuant, PerTensorConstScaling2bit, ActQuantSolver):
    """Activations -1, 0 and 1 by default (``min_val``, ``max_val``)."""

    min_val = -1.0
    max_val = 1.0
