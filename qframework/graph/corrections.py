"""Corrections after calibration: of the biases of layers, and of the statistics of batch norms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.core.snapshot import Snapshot
from qframework.graph.layer_view import WEIGHTED, LayerView
from qframework.graph.quantizers_off import quantizers_off, with_attribute, with_weights
from qframework.graph.weight_writing import own_parameter
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.processes import sum_of_processes
from qframework.quant_tensor import dequantize


class _Correction:
    """Sums of what a layer's float output has more than its quantized one, for each channel, over batches of finite numbers.

    Attributes:
        sum: None for no such batch.
        count: of the summands of a channel.
        left_out: whether there were other batches.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0
        self.left_out = False

    def add(self, difference: Tensor, axis: int) -> None:
        rows = difference.movedim(axis, 0).flatten(1).to(torch.float64)
        total = rows.sum(dim=1)
        if not bool(torch.isfinite(total).all()):
            self.left_out = True
            return
        self.sum = total if self.sum is None else self.sum + total
        self.count += rows.shape[1]


@contextmanager
def bias_correction_mode(
    model: nn.Module,
    enabled: bool = True,
    skip_if_no_bias: bool = False,
    float_weights: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Correct biases so that each layer's channels have the mean of the float model (Nagel 2019, https://arxiv.org/abs/1906.04721).

    In the context each layer with a quantized weight, input or bias computes in floats too, on the input that it is given, which
    is the float model's, since the float output goes on. On leaving it ``bias += mean(float output - quantized output)``,
    over all samples and positions. The quantizer of the layer's own output is left out of it.

    In several processes the means are those over the data of all; each has to enter the context.

    Args:
        model: with quantized layers, calibrated, in evaluation mode.
        enabled: False makes the context do nothing.
        skip_if_no_bias: leave layers without a bias alone, rather than give them one.
        float_weights: from names of layers to the weights of the float model, where an algorithm has chosen other ones since:
            ``gptq(model, batches).float_weights``.

    Yields:
        The model. If the body raises, nothing is changed.

    Warns:
        UserWarning: layers that no data reached; layers of which batches that held NaN or infinity were left out.

    Example::

        with torch.no_grad(), bias_correction_mode(model):
            for batch, _ in loader:
                model(batch)
    """
    check_module(model, "bias_correction_mode")
    if not enabled:
        yield model
        return
    layers = {m: n for n, m in model.named_modules() if _can_be_corrected(m, skip_if_no_bias)}
    found = {m: _Correction() for m in layers}
    known = float_weights or {}
    for name in known:
        if name not in dict(model.named_modules()):
            raise ValueError(
                f"bias_correction_mode: float_weights names {name!r}, which the model doesn't have"
            )

    def correct(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        weight: Any = layer._parameters.get("weight")
        held = {} if layers[layer] not in known else {weight: known[layers[layer]]}
        with torch.no_grad(), quantizers_off(layer), with_weights(held):
            exact = layer.forward(*args, **kwargs)
        quantized = dequantize(output).detach()
        found[layer].add(exact - quantized, LayerView(layer).channel_axis(quantized))
        return exact

    with ExitStack() as stack:
        for layer in layers:
            proxy: Any = layer.output_quant
            stack.enter_context(with_attribute(proxy, "disable_quant", True))
            stack.enter_context(with_attribute(layer, "return_quant_tensor", False))
            handle = layer.register_forward_hook(correct, with_kwargs=True)
            stack.callback(handle.remove)
        yield model
    without, left_out = [], []
    for layer, correction in found.items():
        if correction.left_out:
            left_out.append(layers[layer])
        mean = _mean_of_processes(correction, layer)
        if mean is None:
            without.append(layers[layer])
        else:
            add_to_bias(layer, mean)
    if without:
        warnings.warn(
            f"bias_correction_mode: no data reached {', '.join(without)}; their biases stay",
            UserWarning,
            stacklevel=3,
        )
    if left_out:
        warnings.warn(
            f"bias_correction_mode: batches that gave NaN or infinity were left out of {', '.join(left_out)}",
            UserWarning,
            stacklevel=3,
        )


def _can_be_corrected(module: nn.Module, skip_if_no_bias: bool) -> bool:
    if not isinstance(module, QuantWeightBiasInputOutputLayer) or not isinstance(module, WEIGHTED):
        return False
    proxies: tuple[Any, ...] = (module.weight_quant, module.input_quant, module.bias_quant)
    if not any(p.is_quant_enabled for p in proxies):
        return False
    return "bias" in module._parameters and not (skip_if_no_bias and module.bias is None)


def _mean_of_processes(correction: _Correction, layer: Any) -> Tensor | None:
    channels = layer._output_channels()
    total = correction.sum
    if total is None:
        total = torch.zeros(channels, dtype=torch.float64, device=layer.weight.device)
    count = torch.full((1,), float(correction.count), dtype=torch.float64, device=total.device)
    total, count = sum_of_processes(total), sum_of_processes(count)
    return total / count if float(count) else None


@torch.no_grad()
def add_to_bias(layer: Any, amount: Tensor) -> None:
    """Add a number to each output channel; a missing bias is created."""
    if layer.bias is None:
        weight = layer.weight
        layer.bias = nn.Parameter(
            amount.to(weight.device, weight.dtype), requires_grad=weight.requires_grad
        )
    else:
        bias = own_parameter(layer, "bias")
        bias.copy_(bias.to(amount.dtype) + amount.to(bias.device))


@contextmanager
def norm_correction_mode(model: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """Estimate the statistics of batch norms anew, from what the quantized model gives them.

    In the context batch norms take the plain mean over all batches; on leaving it the mean is the new one, the variance the
    geometric mean of the old and the new one, ``sqrt(old * new)``. Modes, momentum and counters are as before.

    Args:
        model: with batch norms that weren't folded.
        enabled: False makes the context do nothing.

    Yields:
        The model. If the body raises, everything is as it was.

    Warns:
        UserWarning: batch norms that no data reached, or NaN or infinity; they keep their statistics.
    """
    check_module(model, "norm_correction_mode")
    if not enabled:
        yield model
        return
    norms: dict[Any, str] = {
        m: n
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    }
    before = {m: Snapshot(m) for m in norms}
    old = {m: (m.running_mean.clone(), m.running_var.clone()) for m in norms}
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        yield model
        new = {m: _new_statistics(m) for m in norms}
    finally:
        for snapshot in before.values():
            snapshot.restore()
    without = []
    for m, found in new.items():
        if found is None or not all(bool(torch.isfinite(t).all()) for t in found):
            without.append(norms[m])
            continue
        mean, var = found
        m.running_mean.copy_(mean)
        m.running_var.copy_((old[m][1] * var).sqrt())
    if without:
        warnings.warn(
            f"norm_correction_mode: no data, or NaN or infinity, reached {', '.join(without)}; they keep their statistics",
            UserWarning,
            stacklevel=3,
        )


def _new_statistics(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and variance over the batches of all processes."""
    batches = norm.num_batches_tracked.to(torch.float64).reshape(1)
    mean, var = (t.to(torch.float64) * batches for t in (norm.running_mean, norm.running_var))
    count, mean, var = (sum_of_processes(t) for t in (batches, mean, var))
    if not float(count):
        return None
    dtype = norm.running_mean.dtype
    return (mean / count).to(dtype), (var / count).to(dtype)
