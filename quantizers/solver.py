"""How each kind of quantizer resolves its policies: one slot, one function, one table.

A solver comes last among the bases of a quantizer. It binds every slot that the quantizer doesn't bind itself.
"""

from __future__ import annotations

from qframework.quantizers.activation_solver import ActQuantSolver
from qframework.quantizers.common_solver import QuantSolver
from qframework.quantizers.parameter_solver import BiasQuantSolver, WeightQuantSolver
from qframework.quantizers.parameter_solver import ParameterQuantSolver as ParameterQuantSolver

__all__ = [
    "ActQuantSolver",
    "BiasQuantSolver",
    "QuantSolver",
    "WeightQuantSolver",
]
