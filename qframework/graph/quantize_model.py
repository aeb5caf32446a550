"""From a float model to a quantized one: layers replaced by type or by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from qframework.graph.conversion_report import QuantizationReport
from qframework.graph.conversion_rule import Rule, matches
from qframework.graph.conversion_work import Work
from qframework.graph.end_layers import end_rules
from qframework.graph.first_forward import FirstForward
from qframework.graph.forms import Forms
from qframework.graph.function_calls import run_calls, traced_calls
from qframework.graph.function_conversion import Functions
from qframework.graph.torch_transformers import call_changed_parts
from qframework.inject import UnknownNameError

_UNSET: Any = object()


def quantize_model(
    model: nn.Module,
    *,
    weight_quant: Any = _UNSET,
    bias_quant: Any = _UNSET,
    input_quant: Any = _UNSET,
    output_quant: Any = _UNSET,
    act_quant: Any = _UNSET,
    rules: Sequence[Rule] = (),
    first: Mapping[str, Any] | None = None,
    last: Mapping[str, Any] | None = None,
    fold_batch_norm: bool = False,
    functions: bool = False,
    example_input: tuple[Any, ...] | None = None,
    inplace: bool = False,
    strict: bool = False,
    **keywords: Any,
) -> tuple[nn.Module, QuantizationReport]:
    """Replace the torch layers of a model by their quantized ones.

    The result shares the parameters of the model (recurrent and attention layers, whose weights are arranged
    otherwise, and layers that a batch norm is folded into have copies); the model itself isn't changed. A module that
    stands in several places is one module in all of them; a rule finds it by any of its names. Norms and softmax stay
    floats unless a rule names them. Layers that quantize their biases by themselves (attention, recurrent layers, encoder
    layers), by input scale times weight scale, leave them in floats where there is no such scale: with minifloats, codebooks,
    groups, or an input that nothing quantizes. The report says so.

    Args:
        model: the float model.
        weight_quant: quantizer of all weights, in place of the layers' defaults.
        bias_quant: quantizer of all biases.
        input_quant: quantizer of the inputs of layers with weights.
        output_quant: quantizer of their outputs.
        act_quant: quantizer of the results of activation functions.
        rules: what becomes of modules by name or type; a later rule wins over an earlier one.
        first: what a rule says, for the first layer with a weight, ``{"weight_bit_width": 8}`` or ``{"keep_float": True}``;
            it wins over ``rules``.
        last: the same for the last such layer.
        fold_batch_norm: fold a batch norm into the convolution or linear layer in front of it; for evaluation, exact.
            Norms behind linear layers then take inputs of two axes alone.
        functions: quantize functions that modules call themselves (``x + y``, ``torch.cat``, ``torch.matmul``,
            ``F.scaled_dot_product_attention``, activations), by ``act_quant`` and its keywords. The operands of a sum and of a
            concatenation share a scale. Without it they are only listed in the report.
        example_input: arguments of the model, which it is run with once, in evaluation mode, to find the functions of
            modules that can't be traced; needed for ``functions`` where there are such.
        inplace: change the model itself; after an error it is as it was.
        strict: refuse a model with layers that have no quantized form.
        **keywords: names to bind anew in the quantizers, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``,
            ``act_``.

    Returns:
        The quantized model, and a report of what was replaced, what stayed float and why.

    Raises:
        TypeError: anything but a module, one of TorchScript, or something among ``rules`` that isn't a rule.
        ValueError: a rule that fits nothing; a bias quantizer that needs the scale of products that have none; with ``strict`` a layer without a quantized form.
        QuantizerError: a quantizer can't be built, a keyword is unknown, or no module that a rule fits has a tensor for
            its keyword; a TypeError or ValueError too.

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
    _check_model(model)
    _check_keywords(keywords)
    _check_rules(rules, model)
    forms = Forms(model)
    rules = [*rules, *end_rules(model, forms, first, last)]
    work = Work(rules, common, model, fold_batch_norm, inplace, forms)
    calls = traced_calls(model, forms)
    if example_input is not None:
        calls = run_calls(model, _as_arguments(example_input))
    result = work.converted(model)
    report = work.report
    report_functions = Functions(work, calls, functions)
    report_functions.plan()
    work.check()
    if report.unsupported:
        text = "; ".join(f"{e.name or 'the model'}: {e.reason}" for e in report.unsupported)
        if strict:
            raise ValueError(f"quantize_model: some layers have no quantized form. {text}")
        warnings.warn(f"quantize_model left layers in floats. {text}", UserWarning, stacklevel=2)
    work.finish()
    report_functions.apply()
    call_changed_parts(result)
    FirstForward(report, report_functions.unknown_names()).attach(result)
    return result, report


def _as_arguments(example_input: Any) -> tuple[Any, ...]:
    if not isinstance(example_input, tuple):
        raise TypeError(
            "quantize_model: example_input must be a tuple of the model's arguments, such as (x,); got "
            f"{type(example_input).__name__}"
        )
    return example_input


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        hint = ", which is what quantize_model returns: the model and a report"
        raise TypeError(
            f"quantize_model: model must be a torch.nn.Module; got a {type(model).__name__}{hint if isinstance(model, tuple) else ''}"
        )
    for name, module in model.named_modules():
        if isinstance(module, ScriptModule):
            raise TypeError(
                f"quantize_model: {name or 'the model'} is TorchScript, whose layers can't be replaced; quantize the model "
                "that it was made from"
            )


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
    names = list(model.named_modules(remove_duplicate=False))
    if isinstance(rules, Rule):
        raise TypeError(
            "quantize_model: rules must be a list of rules; got a single Rule, write [Rule(...)]"
        )
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                "quantize_model: rules must be a list of Rule(name or type, keywords); got "
                f"{rule!r} of type {type(rule).__name__} in it"
            )
        for match in rule.match:
            if any(matches(match, n, m) for n, m in names):
                continue
            if isinstance(match, type):
                there = sorted({type(m).__name__ for _, m in names})
                raise ValueError(
                    f"quantize_model: no module is a {match.__name__}; the model has {', '.join(there)}"
                )
            text = match if isinstance(match, str) else match.pattern
            close = difflib.get_close_matches(text, [n for n, _ in names if n], n=3, cutoff=0.4)
            hint = f" Near names: {', '.join(close)}" if close else ""
            raise ValueError(f"quantize_model: no module's name fits {text!r}.{hint}")
