"""Predefined quantizers, and the building blocks to make more of them."""

from typing import TYPE_CHECKING

from qframework.quantizers.activation_solver import *
from qframework.quantizers.base import *
from qframework.quantizers.binary import *
from qframework.quantizers.codebook import *
from qframework.quantizers.common_solver import *
from qframework.quantizers.decoupled import *
from qframework.quantizers.dynamic import *
from qframework.quantizers.fixed_point import *
from qframework.quantizers.groupwise import *
from qframework.quantizers.learned_step import *
from qframework.quantizers.microscaling import *
from qframework.quantizers.minifloat import *
from qframework.quantizers.minifloat_base import *
from qframework.quantizers.minifloat_dynamic import *
from qframework.quantizers.minifloat_fnuz import *
from qframework.quantizers.minifloat_ocp import *
from qframework.quantizers.none import *
from qframework.quantizers.parameter_solver import *
from qframework.quantizers.scaled_int import *
from qframework.quantizers.searched import *
from qframework.quantizers.shifted_scaled_int import *
from qframework.quantizers.ternary import *
from qframework.quantizers.trunc import *
from qframework.quantizers.trunc_solver import *

# In the order of the catalogue. Type checkers follow the imports; a list that is put together hides them.
if not TYPE_CHECKING:
    __all__ = [
        *scaled_int.__all__,
        *shifted_scaled_int.__all__,
        *fixed_point.__all__,
        *dynamic.__all__,
        *groupwise.__all__,
        *binary.__all__,
        *ternary.__all__,
        *learned_step.__all__,
        *decoupled.__all__,
        *codebook.__all__,
        *minifloat.__all__,
        *minifloat_ocp.__all__,
        *minifloat_fnuz.__all__,
        *minifloat_dynamic.__all__,
        *microscaling.__all__,
        *trunc.__all__,
        *none.__all__,
        *base.__all__,
        *minifloat_base.__all__,
        *searched.__all__,
        *common_solver.__all__,
        *parameter_solver.__all__,
        *activation_solver.__all__,
        *trunc_solver.__all__,
    ]
del TYPE_CHECKING
