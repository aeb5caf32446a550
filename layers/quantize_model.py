"""From a float model to a quantized one: layers replaced by type or by name."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qframework.inject import UnknownNameError
from qframework.layers.base import QuantLayer
from qframework.layers.batch_norm_folding import foldable_pairs
from qframework.layers.conversion import CONVERSIONS, NEUTRAL, Conversion, arguments_of
from qframework.layers.conversion_report import QuantizationReport

_UNSET: Any = object()


class Rule:
    """What becomes of the modules that a pattern or a type names.

    ::

        Rule("head", keep_float=True)
        Rule("features.*", weight_bit_width=4)
        Rule(nn.GELU, act_quant=Int8ActPerTensorFloat)
        Rule("attention", to=MyAttention, num_heads=8)

    Args:
        match: a name (``*`` and ``?`` as in file names), a compiled regular expression, a type, or several of them.
        to: the class to build instead, with the constructor arguments of the torch layer and the keywords.
        keep_float: leave them alone.
        **keywords: arguments for the quantized layer, which win over those for the model. Where several modules fit,
            those for a weight, bias, input, output or activation go to the layers that quantize one.
    """

    def __init__(
        self,
        match: Any,
        to: type[nn.Module] | None = None,
        keep_float: bool = False,
        **keywords: Any,
    ) -> None:
        several = match if isinstance(match, (tuple, list)) else (match,)
        for one in several:
            if not isinstance(one, (str, re.Pattern, type)):
                raise TypeError(
                    f"Rule: match must be a name, a compiled pattern or a type, got {one!r} of type {type(one).__name__}"
                )
        self.match, self.to, self.keep_float, self.keywords = (
            tuple(several),
            to,
            keep_float,
            keywords,
        )

    def fits(self, name: str, module: nn.Module) -> bool:
        """Whether it names a module."""
        return any(self._fits(m, name, module) for m in self.match)

    @staticmethod
    def _fits(match: Any, name: str, module: nn.Module) -> bool:
        if isinstance(match, type):
            return type(module) is match
        if isinstance(match, re.Pattern):
            return match.fullmatch(name) is not None
        return fnmatch.fnmatchcase(name, match)

    def __repr__(self) -> str:
        shown = [getattr(m, "__name__", repr(m)) for m in self.match]
        return f"Rule({', '.join(shown)})"


def quantize_model(
    model: nn.Module,
    *,
    weight_quant: Any = _UNSET,
    bias_quant: Any = _UNSET,
    input_quant: Any = _UNSET,
    output_quant: Any = _UNSET,
    act_quant: Any = _UNSET,
    rules: Sequence[Rule] = (),
    fold_batch_norm: bool = False,
    inplace: bool = False,
    strict: bool = False,
    **keywords: Any,
) -> tuple[nn.Module, QuantizationReport]:
    """Replace the torch layers of a model by their quantized ones.

    The result shares the parameters of the model (recurrent and attention layers, whose weights are arranged
    otherwise, and layers that a batch norm is folded into have copies); the model itself isn't changed. A module that
    stands in several places is one module in all of them. Norms and softmax stay floats unless a rule names them.

    Args:
        model: the float model.
        weight_quant: quantizer of all weights, in place of the layers' defaults.
        bias_quant: quantizer of all biases.
        input_quant: quantizer of the inputs of layers with weights.
        output_quant: quantizer of their outputs.
        act_quant: quantizer of the results of activation functions.
        rules: what becomes of modules by name or type; a later rule wins over an earlier one.
        fold_batch_norm: fold a batch norm into the convolution or linear layer in front of it; for evaluation, exact.
        inplace: change the model itself.
        strict: refuse a model with layers that have no quantized form.
        **keywords: names to bind anew in the quantizers, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``,
            ``act_``.

    Returns:
        The quantized model, and a report of what was replaced, what stayed float and why.

    Raises:
        ValueError: a rule that fits nothing; with ``strict`` a layer without a quantized form.
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.

    Warns:
        UserWarning: layers that have no quantized form, without ``strict``.
    """
    quantizers = {
        "weight_quant": weight_quant,
        "bias_quant": bias_quant,
        "input_quant": input_quant,
        "output_quant": output_quant,
        "act_quant": act_quant,
    }
    common = {n: q for n, q in quantizers.items() if q is not _UNSET} | keywords
    _check_keywords(keywords)
    _check_rules(rules, model)
    folds = foldable_pairs(model) if fold_batch_norm else {}
    counts = {r: sum(r.fits(n, m) for n, m in model.named_modules()) for r in rules}
    work = _Work(rules, common, folds, inplace, counts)
    result = work.converted("", model)
    report = work.report
    if report.unsupported:
        text = "; ".join(f"{e.name or 'the model'}: {e.reason}" for e in report.unsupported)
        if strict:
            raise ValueError(f"quantize_model: some layers have no quantized form. {text}")
        warnings.warn(f"quantize_model left layers in floats. {text}", UserWarning, stacklevel=2)
    return result, report


def _check_keywords(keywords: Iterable[str]) -> None:
    prefixes = ("weight_", "bias_", "input_", "output_", "act_")
    for name in keywords:
        if not name.startswith(prefixes):
            close = difflib.get_close_matches(name, [p + "bit_width" for p in prefixes], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UnknownNameError(
                f"quantize_model: unknown keyword {name}.{hint} Keywords for quantizers start with "
                f"{', '.join(repr(p) for p in prefixes)}; others belong in a Rule"
            )


def _check_rules(rules: Sequence[Rule], model: nn.Module) -> None:
    names = dict(model.named_modules())
    for rule in rules:
        for match in rule.match:
            if any(Rule._fits(match, n, m) for n, m in names.items()):
                continue
            if isinstance(match, type):
                there = sorted({type(m).__name__ for m in names.values()})
                raise ValueError(
                    f"quantize_model: no module is a {match.__name__}; the model has {', '.join(there)}"
                )
            text = match if isinstance(match, str) else match.pattern
            close = difflib.get_close_matches(text, [n for n in names if n], n=3, cutoff=0.4)
            hint = f" Near names: {', '.join(close)}" if close else ""
            raise ValueError(f"quantize_model: no module's name fits {text!r}.{hint}")


class _Work:
    """One conversion."""

    def __init__(
        self,
        rules: Sequence[Rule],
        common: dict[str, Any],
        folds: dict[nn.Module, nn.Module],
        inplace: bool,
        counts: dict[Rule, int],
    ) -> None:
        self.rules, self.common, self.inplace = rules, common, inplace
        self.folds = folds
        self.counts = counts
        self.folded: set[int] = set()
        self.done: dict[int, nn.Module] = {}
        self.report = QuantizationReport()

    def converted(self, name: str, module: nn.Module) -> nn.Module:
        """What stands for a module."""
        if id(module) not in self.done:
            self.done[id(module)] = self._convert(name, module)
        return self.done[id(module)]

    def _convert(self, name: str, module: nn.Module) -> nn.Module:
        fitting = [r for r in self.rules if r.fits(name, module)]
        if fitting and fitting[-1].keep_float:
            self.report.add(name, module, None, "as a rule says", kept=True)
            return self._copied(module)
        if isinstance(module, QuantLayer):
            self.report.add(name, module, None, "quantized already", kept=True)
            return self._copied(module)
        conversion = CONVERSIONS.get(type(module))
        target = next((r.to for r in reversed(fitting) if r.to is not None), None)
        if target is not None or (conversion and (conversion.by_default or fitting)):
            return self._replaced(name, module, conversion, target, fitting)
        if any(m is module for m in self.folds.values()) and id(module) in self.folded:
            self.report.add(name, module, nn.Identity, "folded into the layer in front")
            return nn.Identity()
        self._tell(name, module, conversion)
        return self._descended(name, module)

    def _tell(self, name: str, module: nn.Module, conversion: Conversion | None) -> None:
        """Report what stays a float."""
        own = [n for n, p in module._parameters.items() if p is not None]
        if conversion is not None:
            self.report.add(name, module, None, "stays float unless a rule names it", kept=True)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            self.report.add(name, module, None, "batch norm; see fold_batch_norm", kept=True)
        elif (base := next((t for t in CONVERSIONS if isinstance(module, t)), None)) is not None:
            why = f"a {type(module).__name__} may compute otherwise than its base {base.__name__}; name it in a Rule with to="
            self.report.add(name, module, None, why)
        elif own:
            self.report.add(name, module, None, f"has parameters of its own: {', '.join(own)}")
        elif not module._modules and type(module).__module__.startswith("torch.nn"):
            if not isinstance(module, NEUTRAL):
                self.report.add(name, module, None, "no quantized form")

    def _replaced(
        self,
        name: str,
        module: nn.Module,
        conversion: Conversion | None,
        target: type[nn.Module] | None,
        fitting: list[Rule],
    ) -> nn.Module:
        layer = target or conversion.layer  # type: ignore[union-attr]
        special = conversion.special if conversion else {}
        arguments = arguments_of(module, layer, special)
        if conversion is not None:
            # The input of an activation function is the output of a layer: a quantizer for inputs isn't meant for it.
            meant = set(conversion.roles) - ({"input"} if "act" in conversion.roles else set())
            common = {n: v for n, v in self.common.items() if n.split("_", 1)[0] in meant}
            arguments |= {p + n: v for p in conversion.prefixes for n, v in common.items()}
        for rule in fitting:
            arguments |= self._of_rule(rule, None if conversion is None else conversion.roles)
        where = f"{name or 'the model'}: "
        try:
            with torch.random.fork_rng(devices=[]):
                made = layer(**arguments)
        except Exception as error:
            error.args = (where + str(error), *error.args[1:])
            raise
        self._take_over(module, made, bool(conversion and conversion.copies))
        norm = self.folds.get(module)
        if norm is not None and hasattr(made, "merge_bn_in"):
            made.weight = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator, union-attr]
            if module.bias is not None:
                made.bias = nn.Parameter(module.bias.detach().clone())  # type: ignore[operator, union-attr]
            made.merge_bn_in(norm)  # type: ignore[operator]
            self.folded.add(id(norm))
        self.report.add(name, module, layer)
        return made

    def _of_rule(self, rule: Rule, roles: tuple[str, ...] | None) -> dict[str, Any]:
        """The keywords of a rule; one for several modules may name tensors that only some of them have."""
        if roles is None or self.counts[rule] < 2:
            return rule.keywords
        absent = {"weight", "bias", "input", "output", "act"} - set(roles)
        return {n: v for n, v in rule.keywords.items() if n.split("_", 1)[0] not in absent}

    @staticmethod
    def _take_over(module: nn.Module, made: nn.Module, copies: bool) -> None:
        """Parameters, mode and hooks of the float layer."""
        if copies:
            made.load_state_dict(module.state_dict(), strict=False)
        else:
            for key, parameter in module._parameters.items():
                if key in made._parameters and parameter is not None:
                    setattr(made, key, parameter)
        made.train(module.training)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
            getattr(made, hooks).update(getattr(module, hooks))

    def _descended(self, name: str, module: nn.Module) -> nn.Module:
        result = module if self.inplace else _shell(module)
        for child, held in list(module._modules.items()):
            if held is not None:
                path = f"{name}.{child}" if name else child
                result._modules[child] = self.converted(path, held)
        return result

    def _copied(self, module: nn.Module) -> nn.Module:
        if self.inplace:
            return module
        result = _shell(module)
        for child, held in module._modules.items():
            if held is not None:
                if id(held) not in self.done:
                    self.done[id(held)] = self._copied(held)
                result._modules[child] = self.done[id(held)]
        return result


def _shell(module: nn.Module) -> nn.Module:
    """A module with the same parameters, buffers of its own, and a list of children of its own."""
    result = copy.copy(module)
    for held in ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"):
        result.__dict__[held] = copy.copy(module.__dict__[held])
    buffers = module.__dict__["_buffers"]
    result.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in buffers.items()}
    return result
