"""What each module of a model computes, as far as conversion is concerned."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qframework.graph.batch_norm_folding import children_behind
from qframework.graph.conversion import CONVERSIONS, NEUTRAL, Conversion, by_shape
from qframework.graph.own_forward import BASES, reads_its_weight
from qframework.graph.same_computation import SameComputation, same_computation
from qframework.graph.tracing import Traced, trace

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LEAVES = (
    *CONVERSIONS,
    nn.modules.batchnorm._BatchNorm,
    *(t for t in NEUTRAL if t not in _CONTAINERS),
)


class Forms:
    """The torch layer that each module computes the same as, found once for a conversion.

    Args:
        model: the float model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[nn.Module, SameComputation | str | None] = {}
        self._last: dict[nn.Module, nn.Module] = {}
        self._own: dict[nn.Module, type[nn.Module] | None] = {}
        self._shapes: dict[nn.Module, Conversion | None] = {}
        self.traced = trace(model, leaves=self.is_leaf)

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a module is one of torch's layers, or derived from one."""
        return isinstance(module, _LEAVES) or type(module).__name__ == "Conv1D"

    def graphs(self) -> list[Traced]:
        """The graph of the model; where it has none, those of the modules' own forwards that have."""
        if isinstance(self.traced, Traced):
            return [self.traced]
        holders = [m for m in self.model.modules() if m._modules and not self.is_leaf(m)]
        found = (trace(m, own=True) for m in holders)
        return [t for t in found if isinstance(t, Traced)]

    def last_step(self, module: nn.Module) -> nn.Module:
        """The module that gives a leaf's result: the activation within a batch norm that has one, else the leaf itself."""
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module._modules:
            return module
        if module not in self._last:
            steps = [module._modules[n] for n in children_behind(module) or ()]
            steps = [s for s in steps if s is not None and not isinstance(s, nn.Identity)]
            self._last[module] = steps[-1] if steps and steps[-1] is not None else module
        return self._last[module]

    def of(self, module: nn.Module) -> SameComputation | str | None:
        """What a module computes the same as; a reason where that isn't known, None where it is none of torch's layers."""
        if module not in self._known:
            self._known[module] = same_computation(module, CONVERSIONS)
        return self._known[module]

    def base_of(self, module: nn.Module) -> type[nn.Module] | None:
        """The torch layer whose weight, a parameter, a module uses."""
        form = self.of(module)
        return form.base if isinstance(form, SameComputation) and form.weight is None else None

    def own_forward(self, module: nn.Module) -> type[nn.Module] | None:
        """The torch layer that a module's class is derived from, where it computes otherwise, with the weight of that layer."""
        if not isinstance(self.of(module), str) or "forward" in vars(module):
            return None
        if module not in self._own:
            base = next((t for t in BASES if isinstance(module, t)), None)
            right = base is not None and not module._modules and reads_its_weight(module)
            self._own[module] = base if right else None
        return self._own[module]

    def conversion(self, module: nn.Module) -> Conversion | None:
        """How a module is converted; None where it isn't."""
        form = self.of(module)
        if isinstance(form, SameComputation):
            return CONVERSIONS[form.base]
        own = self.own_forward(module)
        if own is not None:
            return CONVERSIONS[own]
        if form is None:
            if module not in self._shapes:
                self._shapes[module] = by_shape(module)
            return self._shapes[module]
        return None


def is_computed(module: nn.Module) -> bool:
    """Whether a weight or bias isn't a parameter, but computed by a hook or a parametrization."""
    return is_parametrized(module) or any(
        name not in module._parameters and isinstance(vars(module).get(name), torch.Tensor)
        for name in ("weight", "bias")
    )
