"""One conversion of a model: which module becomes what, and the tree that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qframework.graph.batch_norm_folding import Foldable, FoldedBatchNorm, foldable
from qframework.graph.bias_scales import asked_for, biases_without_scale, left_out, told
from qframework.graph.conversion import (
    NEUTRAL,
    Conversion,
    NoQuantizedForm,
    arguments_of,
)
from qframework.graph.conversion_keywords import role_of
from qframework.graph.conversion_report import QuantizationReport
from qframework.graph.conversion_rule import Rule
from qframework.graph.forms import Forms, is_computed
from qframework.graph.input_sources import InputSource, input_sources
from qframework.graph.layer_wrappers import ChannelFactor
from qframework.graph.module_shells import shell
from qframework.graph.own_forward import with_own_forward
from qframework.graph.rules_in_model import RulesInModel
from qframework.graph.same_computation import SameComputation
from qframework.graph.taken_over import fold, hold, take_over
from qframework.graph.torch_transformers import changed_parts
from qframework.graph.tracing import Traced
from qframework.graph.weight_forms import compute_weight, read_quantized
from qframework.graph.weight_readers import readers_in_source, weight_readers
from qframework.graph.widths import bits_of_proxy
from qframework.layers.base import QuantLayer

_OF_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


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
        forms: Forms,
    ) -> None:
        self.rules, self.inplace = RulesInModel(rules, common, model), inplace
        self.names, self.forms = self.rules.names, forms
        self.done: dict[nn.Module, nn.Module] = {}
        self.planned: list[tuple[nn.Module, str, nn.Module]] = []
        self.report = QuantizationReport()
        devices = {p.device for p in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None
        self.foldable = foldable(model, forms.traced, forms.base_of) if fold else Foldable()
        self.folds: dict[nn.Module, nn.Module] = {}
        for layer, norm in self.foldable.pairs.items():
            if self.rules.is_kept(norm):
                self.foldable.reasons[norm] = "as a rule says"
            elif not self._is_replaced(layer):
                self.foldable.reasons[norm] = "the layer in front stays float"
            else:
                self.folds[layer] = norm
        self.norms = {n: x for x, n in self.folds.items()}
        self.sources = input_sources(forms.graphs(), forms.last_step)
        self.readers = weight_readers(model)
        # whose parameters have other names in the quantized layer
        self.read_attention = {
            m for m in readers_in_source(model) if isinstance(m, nn.MultiheadAttention)
        }
        if isinstance(forms.traced, Traced):  # knows better than the source which calls are made
            called = (forms.traced.called(n) for n in forms.traced.graph.nodes)
            self.readers.called = {m for m in called if m is not None}
        self.without_scale: list[str] = []

    def _is_replaced(self, module: nn.Module) -> bool:
        """Whether a module gets a quantized layer."""
        if self.rules.is_kept(module) or isinstance(module, QuantLayer) or is_computed(module):
            return False
        if self._in_parts(module):
            return self.rules.target(module) is not None
        conversion = self.forms.conversion(module)
        named = self.rules.names_itself(module)
        return self.rules.target(module) is not None or (
            conversion is not None and (conversion.by_default or named)
        )

    def _in_parts(self, module: nn.Module) -> list[str]:
        """Parts of a layer of several for which its quantized form has no place: that are computed, or that code reads."""
        if isinstance(module, QuantLayer) or not isinstance(module, _OF_PARTS):
            return []
        computed = [
            n or "in_proj"
            for n, m in module.named_modules()
            if (n and is_computed(m)) or m in self.read_attention
        ]
        attention = isinstance(module, nn.MultiheadAttention)
        return computed if attention else list(dict.fromkeys([*changed_parts(module), *computed]))

    # ------------------------------------------------------------ the tree

    def converted(self, module: nn.Module) -> nn.Module:
        """What stands for a module."""
        if module not in self.done:
            self.done[module] = self._convert(self.names[module][0], module)
        return self.done[module]

    def check(self) -> None:
        """Every keyword of a rule has gone to a layer, and every bias quantizer has a scale.

        Raises:
            UnknownNameError: a rule's keyword that no module had a tensor for.
            ValueError: a bias quantizer that needs the scale of an input that nothing quantizes.
        """
        if self.without_scale:
            raise ValueError(
                "quantize_model: these bias quantizers take input scale times weight scale, and their layers have no "
                f"such scale: {', '.join(self.without_scale)}. Quantize the input (input_quant=Int8ActPerTensorFloat) and "
                "the weight to integers, each with one scale for a channel's products, or give a bias quantizer with a "
                "scale of its own, such as Int8BiasPerTensorFloatInternalScaling, or bias_quant=None"
            )
        self.rules.check()

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
            return self._folded(name, module)
        if self._is_replaced(module):
            try:
                return self._replaced(name, module, self.forms.conversion(module))
            except NoQuantizedForm as reason:
                self.report.add(name, module, None, str(reason))
                return self._descended(module, report=False)
        if self.rules.is_kept(module):
            self.report.add(name, module, None, "as a rule says", kept=True)
        else:
            self._tell(name, module)
        whole = is_computed(module) or (
            isinstance(module, nn.MultiheadAttention) and bool(self._in_parts(module))
        )
        return self._descended(module, report=not whole)

    def _folded(self, name: str, module: nn.Module) -> nn.Module:
        """What is left of a batch norm: nothing, or the activation that it holds."""
        then = self.foldable.then[module]
        behind_linear = issubclass(self.forms.base_of(self.norms[module]) or nn.Module, nn.Linear)
        made = FoldedBatchNorm(behind_linear, then)
        made.train(module.training)
        self.report.add(name, module, nn.Identity, "folded into the layer in front")
        for child, held in module._modules.items():
            if held is not None:
                made.add_module(child, self.converted(held))
        return made

    def _tell(self, name: str, module: nn.Module) -> None:
        """Report what stays a float."""
        own = [n for n, p in module._parameters.items() if p is not None]
        form = self.forms.of(module)
        kind = type(module).__name__
        if is_computed(module):
            why = "its weight is computed at each call (pruning, weight_norm); make it a parameter first"
            self.report.add(name, module, None, why)
        elif self._in_parts(module):
            what = "are computed, were replaced or are read by code"
            parts = ", ".join(self._in_parts(module))
            if isinstance(module, nn.MultiheadAttention):
                self.report.add(name, module, None, f"its parts {parts} {what}")
            else:
                why = f"its parts are quantized one by one, since {parts} {what}"
                self.report.add(name, module, None, why, kept=True)
        elif self.forms.conversion(module) is not None:
            self.report.add(name, module, None, "stays float unless a rule names it", kept=True)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            why = self.foldable.reasons.get(module, "")
            why = f"batch norm, not folded: {why}" if why else "batch norm; see fold_batch_norm"
            self.report.add(name, module, None, why, kept=True)
        elif "Norm" in kind and own and not module._modules:
            why = form if isinstance(form, str) else f"no quantized form of a {kind} is known"
            self.report.add(name, module, None, f"norms stay float; {why}", kept=True)
        elif isinstance(module, ChannelFactor):
            self.report.add(name, module, None, "a factor in front of a layer", kept=True)
        elif isinstance(form, str):
            self.report.add(name, module, None, f"{form}; name it in a Rule with to=")
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
        layer: Any = self.rules.target(module) or (conversion and conversion.layer)
        form = self.forms.of(module)
        base = form.base if isinstance(form, SameComputation) else None
        own = self.rules.target(module) is None and self.forms.own_forward(module) is not None
        if own:
            return self._with_own_forward(name, module, conversion)
        arguments = arguments_of(module, layer, conversion.special if conversion else {}, base)
        given, reasons = self.rules.keywords(module, conversion), list[str]()
        reader = self.readers.read.get(module)
        if reader is not None and module not in self.readers.called:
            given |= {n: None for n in ("input_quant", "output_quant") if n in given}
            given = {
                n: v
                for n, v in given.items()
                if n.endswith("_quant") or role_of(n) in ("weight", "bias")
            }
        made = self._built(name, layer, arguments, given)
        if conversion is not None and "input" in conversion.roles and "act" not in conversion.roles:
            less, why = self._behind_activation(module, made, given)
            if why:
                made, given = self._built(name, layer, arguments, less), less
                reasons.append(why)
        missing = self._without_scale(name, module, made, given)
        if missing:
            made = self._built(name, layer, arguments, left_out(given, missing))
            reasons.append(told(missing))
        if self.device is not None and not module._parameters:
            made.to(self.device)
        take_over(module, made, bool(conversion and conversion.copies))
        if (
            isinstance(form, SameComputation)
            and form.weight is not None
            and self.rules.target(module) is None
        ):
            for key in form.reads:
                if key not in made._parameters:
                    hold(made, key, module)
            compute_weight(made, form.weight, form.reads)
            reasons.append(f"its weight, computed from {', '.join(form.reads)}, is quantized")
        norm = self.folds.get(module)
        if norm is not None:
            if hasattr(made, "merge_bn_in"):
                fold(module, made, norm)
            else:
                self.foldable.reasons[norm] = f"a {layer.__name__} can't take it"
                del self.norms[norm]
        if reader is not None:
            if read_quantized(made):
                reasons.append(f"its weight is read, quantized, by {reader}")
                if module not in self.readers.called:
                    reasons.append("what it is applied to there stays float")
            else:
                reasons.append(f"its float weight is read by {reader}")
        self.report.add(name, module, layer, "; ".join(reasons))
        return made

    def _with_own_forward(
        self, name: str, module: nn.Module, conversion: Conversion | None
    ) -> nn.Module:
        """A class derived from a torch layer's, with its own forward and a quantized weight."""
        given = self.rules.keywords(module, conversion)
        default = inspect.signature(conversion.layer.__init__).parameters["weight_quant"].default  # type: ignore[union-attr]
        given.setdefault("weight_quant", default)
        reason = f"keeps the forward of {type(module).__name__}, which reads a quantized weight"
        if given.get("bias_quant") is not None:
            reason += "; its bias stays float"
        given = {n: v for n, v in given.items() if role_of(n) != "bias"}

        def build(**keywords: Any) -> nn.Module:
            return with_own_forward(module, keywords)

        made = self._built(name, build, {}, given)
        less, why = self._behind_activation(module, made, given)
        if why:
            made, reason = self._built(name, build, {}, less), f"{reason}; {why}"
        made.train(module.training)
        if self.device is not None:
            made.to(self.device)
        self.report.add(name, module, type(made), reason)
        return made

    def _built(
        self, name: str, layer: Any, arguments: dict[str, Any], given: dict[str, Any]
    ) -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]):
                return layer(**(arguments | given))  # type: ignore[no-any-return]
        except Exception as error:
            error.args = (f"{name or 'the model'}: {error}", *error.args[1:])
            raise

    def _behind_activation(
        self, module: nn.Module, made: nn.Module, given: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """Keywords for a layer whose input is on a grid already, or never negative, and why they differ from those given."""
        proxy: Any = made._modules.get("input_quant")
        source = self.sources.get(module, InputSource(None, False))
        ruled = self.rules.named_keywords(module)
        if proxy is None or not proxy.is_quant_enabled or "input_quant" in ruled:
            return given, ""
        before = self._quantized_activation(source.activation)
        bias: Any = made._modules.get("bias_quant")
        needs_scale = bias is not None and bias.requires_input_scale
        if before is not None and bits_of_proxy(before) <= bits_of_proxy(proxy) and not needs_scale:
            less = {n: v for n, v in given.items() if role_of(n) != "input"}
            return less | {"input_quant": None}, "its input is quantized by the activation in front"
        symmetric = proxy.is_signed and proxy.is_symmetric and "signed" in proxy.quantizer
        if source.unsigned and symmetric and "input_signed" not in given:
            return given | {"input_signed": False}, "its input is never negative: unsigned"
        return given, ""

    def _quantized_activation(self, activation: nn.Module | None) -> Any:
        """The quantizer of an activation's result."""
        if activation is None or activation not in self.names or not self._is_replaced(activation):
            return None
        if "act" not in getattr(self.forms.conversion(activation), "roles", ()):
            return None
        proxy: Any = self.converted(activation)._modules.get("act_quant")
        return proxy if proxy is not None and proxy.is_quant_enabled else None

    def _without_scale(
        self, name: str, module: nn.Module, made: nn.Module, given: dict[str, Any]
    ) -> dict[str, str]:
        """Bias quantizers of a layer's own whose scale can't come from anywhere; those that were asked for are noted."""
        has_bias = module in self.folds or any("bias" in n for n, _ in module.named_parameters())
        before = self.sources.get(module, InputSource(None, False)).activation
        fed = getattr(self.done.get(before or module), "return_quant_tensor", False)
        missing = biases_without_scale(made, fed)
        for keyword, why in missing.items():
            asked = asked_for(keyword, given)
            if asked is not None and has_bias:
                what = f"{keyword}={getattr(asked, '__name__', asked)}"
                self.without_scale.append(f"{name or 'the model'} ({what}: {why})")
        return {n: why for n, why in missing.items() if asked_for(n, given) is None}
