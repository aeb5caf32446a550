"""One conversion of a model: which module becomes what, and the tree that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qframework.graph.batch_norm_folding import FoldedBatchNorm, foldable_pairs
from qframework.graph.conversion import (
    CONVERSIONS,
    NEUTRAL,
    Conversion,
    NoQuantizedForm,
    arguments_of,
)
from qframework.graph.conversion_report import QuantizationReport
from qframework.graph.conversion_rule import Rule
from qframework.graph.module_shells import shell
from qframework.inject import UnknownNameError
from qframework.layers.base import QuantLayer

_ROLES = frozenset({"weight", "bias", "input", "output", "act"})
_HOOKS = tuple(
    n
    for n in nn.Module().__dict__
    if "hook" in n and n.startswith(("_forward", "_back", "_is_full"))
)


class Work:
    """One conversion.

    Args:
        rules: in the order in which they were given.
        common: arguments for all quantized layers.
        model: what is converted.
        fold: whether batch norms are folded.
        inplace: whether the model itself is to change, in :meth:`finish`.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        common: dict[str, Any],
        model: nn.Module,
        fold: bool,
        inplace: bool,
    ) -> None:
        self.rules, self.common, self.model, self.inplace = rules, common, model, inplace
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.counts = [sum(bool(self._fits(r, m)) for m in self.names) for r in rules]
        self.used: set[tuple[int, str]] = set()
        self.done: dict[nn.Module, nn.Module] = {}
        self.planned: list[tuple[nn.Module, str, nn.Module]] = []
        self.report = QuantizationReport()
        devices = {p.device for p in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None
        pairs = foldable_pairs(model) if fold else {}
        self.folds = {x: n for x, n in pairs.items() if self._is_replaced(x) and not self._kept(n)}
        self.norms = {n: x for x, n in self.folds.items()}

    # ------------------------------------------------------------ rules

    def _fits(self, rule: Rule, module: nn.Module) -> str | None:
        """``"itself"`` or ``"within"`` where a rule names a module or something that holds it."""
        found = None
        for name in self.names[module]:
            if rule.fits(name, module):
                return "itself"
            while name:
                name = name.rpartition(".")[0]
                if rule.fits(name, self.model.get_submodule(name)):
                    found = "within"
        return found

    def _rules_of(self, module: nn.Module) -> list[int]:
        return [i for i, r in enumerate(self.rules) if self._fits(r, module)]

    def _kept(self, module: nn.Module) -> bool:
        fitting = self._rules_of(module)
        return bool(fitting) and self.rules[fitting[-1]].keep_float

    def _target(self, module: nn.Module) -> type[nn.Module] | None:
        own = [r for r in self.rules if self._fits(r, module) == "itself"]
        return next((r.to for r in reversed(own) if r.to is not None), None)

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether a module gets a quantized layer."""
        if self._kept(module) or isinstance(module, QuantLayer) or _is_computed(module):
            return False
        conversion = CONVERSIONS.get(type(module))
        named = any(self._fits(r, module) == "itself" for r in self.rules)
        return self._target(module) is not None or (
            conversion is not None and (conversion.by_default or named)
        )

    # ------------------------------------------------------------ the tree

    def converted(self, module: nn.Module) -> nn.Module:
        """What stands for a module."""
        if module not in self.done:
            self.done[module] = self._convert(self.names[module][0], module)
        return self.done[module]

    def check(self) -> None:
        """Every keyword of a rule has gone to a layer.

        Raises:
            UnknownNameError: a rule's keyword that no module had a tensor for.
        """
        for i, rule in enumerate(self.rules):
            for name in rule.keywords:
                if self.counts[i] and (i, name) not in self.used and not rule.keep_float:
                    raise UnknownNameError(
                        f"quantize_model: {name} of {rule!r} has no effect; no module that the rule fits is replaced by "
                        "a layer with such a tensor"
                    )

    def finish(self) -> None:
        """The last step, when nothing can fail any more: in place the model changes; lists point to the new modules."""
        for parent, child, made in self.planned:
            parent._modules[child] = made
        for old, new in self.done.items():
            for name, held in list(vars(new).items()) if new is not old or self.inplace else ():
                if not name.startswith("_"):
                    new.__dict__[name] = self._repointed(held)

    def _repointed(self, held: Any) -> Any:
        """A list, tuple or dict of modules with those that stand for them."""
        if type(held) in (list, tuple):
            return type(held)(self._repointed(h) for h in held)
        if type(held) is dict:
            return {k: self._repointed(h) for k, h in held.items()}
        return self.done.get(held, held) if isinstance(held, nn.Module) else held

    def _convert(self, name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, QuantLayer):
            self.report.add(name, module, None, "quantized already", kept=True)
            return self._descended(module, report=False)
        if module in self.norms:
            self.converted(self.norms[module])
        if module in self.norms:  # still, when its layer has been replaced
            self.report.add(name, module, nn.Identity, "folded into the layer in front")
            return FoldedBatchNorm(isinstance(self.norms[module], nn.Linear))
        if self._is_replaced(module):
            try:
                return self._replaced(name, module, CONVERSIONS.get(type(module)))
            except NoQuantizedForm as reason:
                self.report.add(name, module, None, str(reason))
                return self._descended(module, report=False)
        if self._kept(module):
            self.report.add(name, module, None, "as a rule says", kept=True)
        else:
            self._tell(name, module)
        return self._descended(module, report=not _is_computed(module))

    def _tell(self, name: str, module: nn.Module) -> None:
        """Report what stays a float."""
        own = [n for n, p in module._parameters.items() if p is not None]
        base = next((t for t in CONVERSIONS if isinstance(module, t)), None)
        if _is_computed(module):
            why = "its weight is computed at each call (pruning, weight_norm); make it a parameter first"
            self.report.add(name, module, None, why)
        elif type(module) in CONVERSIONS:
            self.report.add(name, module, None, "stays float unless a rule names it", kept=True)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            self.report.add(name, module, None, "batch norm; see fold_batch_norm", kept=True)
        elif base is not None:
            why = f"a {type(module).__name__} may compute otherwise than its base {base.__name__}"
            self.report.add(name, module, None, f"{why}; name it in a Rule with to=")
        elif own:
            self.report.add(name, module, None, f"has parameters of its own: {', '.join(own)}")
        elif not module._modules and type(module).__module__.startswith("torch.nn"):
            if not isinstance(module, NEUTRAL):
                self.report.add(name, module, None, "no quantized form")

    def _descended(self, module: nn.Module, report: bool = True) -> nn.Module:
        """The module with what stands for its children, or with their like where it is all of one piece."""
        result = module if self.inplace else shell(module)
        for child, held in module._modules.items():
            if held is None:
                continue
            if report:
                made = self.converted(held)
            elif held in self.done:
                made = self.done[held]
            else:
                made = self.done[held] = self._descended(held, report=False)
            if self.inplace:
                self.planned.append((module, child, made))
            else:
                result._modules[child] = made
        return result

    # ------------------------------------------------------------ layers

    def _replaced(self, name: str, module: nn.Module, conversion: Conversion | None) -> nn.Module:
        layer: Any = self._target(module) or (conversion and conversion.layer)
        arguments = arguments_of(module, layer, conversion.special if conversion else {})
        arguments |= self._keywords(module, conversion)
        try:
            with torch.random.fork_rng(devices=[]):
                made: nn.Module = layer(**arguments)
        except Exception as error:
            error.args = (f"{name or 'the model'}: {error}", *error.args[1:])
            raise
        if self.device is not None and not module._parameters:
            made.to(self.device)
        _take_over(module, made, bool(conversion and conversion.copies))
        norm = self.folds.get(module)
        if norm is not None:
            if hasattr(made, "merge_bn_in"):
                _fold(module, made, norm)
            else:
                del self.norms[norm]
        self.report.add(name, module, layer)
        return made

    def _keywords(self, module: nn.Module, conversion: Conversion | None) -> dict[str, Any]:
        """Arguments for quantizers: those for the model, then those of rules."""
        roles = None if conversion is None else set(conversion.roles)
        said: dict[str, Any] = {}
        for i in self._rules_of(module):
            for name, given in self.rules[i].keywords.items():
                absent = roles is not None and _role(name) in _ROLES - roles
                if not (absent and self.counts[i] > 1):
                    said[name] = given
                    self.used.add((i, name))
        if conversion is None or roles is None:
            return said
        # The input of an activation function is the output of a layer: a quantizer for inputs isn't meant for it.
        meant = roles - ({"input"} if "act" in roles else set())
        off = {_role(n) for n, q in said.items() if n.endswith("_quant") and q is None}
        common = {n: v for n, v in self.common.items() if _role(n) in meant - off}
        return {p + n: v for p in conversion.prefixes for n, v in common.items()} | said


def _role(name: str) -> str:
    """The tensor that a keyword is for."""
    return name.split("_", 1)[0]


def _is_computed(module: nn.Module) -> bool:
    """Whether a weight or bias isn't a parameter, but computed by a hook or a parametrization."""
    return is_parametrized(module) or any(
        name not in module._parameters and isinstance(vars(module).get(name), torch.Tensor)
        for name in ("weight", "bias")
    )


def _take_over(module: nn.Module, made: nn.Module, copies: bool) -> None:
    """Parameters, mode and hooks of the float layer."""
    if copies:
        made.load_state_dict(module.state_dict(), strict=False)
    else:
        for key, parameter in module._parameters.items():
            if key in made._parameters and parameter is not None:
                setattr(made, key, parameter)
    made.train(module.training)
    for hooks in _HOOKS:
        held = getattr(module, hooks)
        if isinstance(held, dict):
            getattr(made, hooks).update(held)
        else:
            setattr(made, hooks, held)


def _fold(module: Any, made: Any, norm: nn.Module) -> None:
    """Fold a batch norm into a copy of the weights."""
    for name in ("weight", "bias"):
        old = getattr(module, name)
        if old is not None:
            setattr(made, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    made.merge_bn_in(norm)
    made.bias.requires_grad_(module.weight.requires_grad)
