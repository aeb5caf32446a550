"""What rules say of the modules of a model, and by which keywords their quantized layers are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from qframework.graph.conversion import Conversion
from qframework.graph.conversion_keywords import ROLES, placed, role_of, roles_of
from qframework.graph.conversion_rule import Rule
from qframework.inject import UnknownNameError


class RulesInModel:
    """Rules and the modules of one model.

    Args:
        rules: in the order in which they were given; a later one wins.
        common: arguments for all quantized layers.
        model: whose modules they are about.

    Attributes:
        rules, common, model: as given.
        names: of each module, all of them.
        counts: for each rule, how many modules it fits.
    """

    def __init__(self, rules: Sequence[Rule], common: Mapping[str, Any], model: nn.Module) -> None:
        self.rules, self.common, self.model = rules, common, model
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.counts = [sum(bool(self.fits(r, m)) for m in self.names) for r in rules]
        self._used: set[tuple[int, str]] = set()

    def fits(self, rule: Rule, module: nn.Module) -> str | None:
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

    def _fitting(self, module: nn.Module) -> list[int]:
        return [i for i, r in enumerate(self.rules) if self.fits(r, module)]

    def is_kept(self, module: nn.Module) -> bool:
        """Whether a rule says that a module stays float."""
        fitting = self._fitting(module)
        return bool(fitting) and self.rules[fitting[-1]].keep_float

    def act_keywords(self, module: nn.Module) -> dict[str, Any]:
        """Keywords for results of activations, those for the model and those of rules that fit a module."""
        said = {n: v for n, v in self.common.items() if role_of(n) == "act"}
        for i in self._fitting(module):
            for name, given in self.rules[i].keywords.items():
                if role_of(name) == "act":
                    said[name] = given
                    self._used.add((i, name))
        return said

    def target(self, module: nn.Module) -> type[nn.Module] | None:
        """The class that a rule names for a module."""
        own = [r for r in self.rules if self.fits(r, module) == "itself"]
        return next((r.to for r in reversed(own) if r.to is not None), None)

    def names_itself(self, module: nn.Module) -> bool:
        """Whether a rule names a module, not just something that holds it."""
        return any(self.fits(r, module) == "itself" for r in self.rules)

    def named_keywords(self, module: nn.Module) -> set[str]:
        """Names of the keywords that rules give for a module."""
        return {n for i in self._fitting(module) for n in self.rules[i].keywords}

    def keywords(self, module: nn.Module, conversion: Conversion | None) -> dict[str, Any]:
        """Arguments for quantizers: those for the model, then those of rules."""
        roles = None if conversion is None else set(conversion.roles) | roles_of(conversion)
        said: dict[str, Any] = {}
        for i in self._fitting(module):
            for name, given in self.rules[i].keywords.items():
                absent = roles is not None and role_of(name) in ROLES - roles
                if not (absent and self.counts[i] > 1):
                    said[name] = given
                    self._used.add((i, name))
        if conversion is None or roles is None:
            return said
        off = {role_of(n) for n, q in said.items() if n.endswith("_quant") and q is None}
        meant = roles_of(conversion) - off
        common = {n: v for n, v in self.common.items() if role_of(n) in meant}
        return placed(conversion, common, said)

    def check(self) -> None:
        """Every keyword of a rule has gone to a layer.

        Raises:
            UnknownNameError: a keyword that no module had a tensor for.
        """
        for i, rule in enumerate(self.rules):
            for name in rule.keywords:
                if self.counts[i] and (i, name) not in self._used and not rule.keep_float:
                    raise UnknownNameError(
                        f"quantize_model: {name} of {rule!r} has no effect; no module that the rule fits is replaced by "
                        "a layer with such a tensor"
                    )
