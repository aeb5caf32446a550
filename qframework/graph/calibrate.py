"""Post-training calibration: collect activation statistics of a float forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qframework.arguments import check_module
from qframework.configuration import settings
from qframework.core.collector import CollectThenLearn
from qframework.core.scaling.runtime import RuntimeStats
from qframework.graph.corrections import bias_correction_mode, norm_correction_mode
from qframework.graph.quantizers_off import with_attribute
from qframework.processes import average_of_model
from qframework.proxy import ActQuantProxyFromInjector, ParameterQuantProxyFromInjector, QuantProxy

__all__ = ["bias_correction_mode", "calibration_mode", "norm_correction_mode"]

_NEVER = 2**62


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


class _Snapshot:
    """The state of one collector, to go back to."""

    def __init__(self, collector: CollectThenLearn | RuntimeStats) -> None:
        self.collector = collector
        self.tensors = {n: t.detach().clone() for n, t in _tensors(collector)}
        self.switched = getattr(collector, "switched", False)

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in _tensors(self.collector):
            tensor.copy_(self.tensors[name])
        if isinstance(self.collector, CollectThenLearn):
            self.collector.switched = self.switched


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


@contextmanager
def calibration_mode(model: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """Let activation quantizers collect statistics of the float model.

    Inside the context weights, biases and activations are not quantized and layers return plain tensors; every
    activation quantizer that collects statistics takes the plain mean over all batches, however many
    (``collect_stats_steps`` and momentum don't matter). On leaving it the scales and zero points are fixed from what was
    collected; they can still be trained. Calibrating again starts anew. The modes of modules other than
    activation quantizers are left alone, so batch norms and dropout behave as ``model`` is set.

    In several processes (``torch.distributed``) each may calibrate on its own part of the data: on leaving the context all scales
    are those of one process over all of it. All processes have to enter it, also one without any data; where one calibrates alone,
    set ``settings.reduce_statistics = 'never'`` there.

    A quantizer that saw no data keeps the state that it had, with a warning. If the body raises, everything is
    as it was before.

    Args:
        model: holds quantized layers anywhere.
        enabled: False makes the context do nothing.

    Yields:
        The model.

    Example::

        model.eval()
        with torch.no_grad(), calibration_mode(model):
            for batch, _ in loader:
                model(batch)
        with torch.no_grad(), qframework.frozen(model):  # weights are quantized once
            right = sum((model(batch).argmax(1) == label).sum() for batch, label in loader)
    """
    check_module(model, "calibration_mode")
    if not enabled:
        yield model
        return
    reduce = settings.reduce_statistics != "never"
    proxies = {id(m): (n, m) for n, m in model.named_modules() if isinstance(m, QuantProxy)}
    acts = [(n, p) for n, p in proxies.values() if isinstance(p, ActQuantProxyFromInjector)]
    parameters = [p for _, p in proxies.values() if isinstance(p, ParameterQuantProxyFromInjector)]
    collectors: dict[int, tuple[str, CollectThenLearn | RuntimeStats]] = {}
    for name, proxy in acts:
        if proxy.is_quant_enabled:
            for module in proxy.modules():
                if isinstance(module, (CollectThenLearn, RuntimeStats)):
                    collectors.setdefault(id(module), (name, module))
    snapshots = [_Snapshot(c) for _, c in collectors.values()]
    try:
        with ExitStack() as stack:
            for parameter in parameters:
                stack.enter_context(with_attribute(parameter, "disable_quant", True))
            for _, act in acts:
                if act.is_quant_enabled:
                    stack.enter_context(_training(act))
                    stack.enter_context(with_attribute(act, "observer_only", True))
            for module in model.modules():
                if hasattr(module, "return_quant_tensor"):
                    stack.enter_context(with_attribute(module, "return_quant_tensor", False))
            for _, collector in collectors.values():
                stack.enter_context(with_attribute(collector, "momentum", None))
                collector.restart_collection()
                if isinstance(collector, CollectThenLearn):
                    stack.enter_context(with_attribute(collector, "collect_stats_steps", _NEVER))
            stack.enter_context(settings.use(reduce_statistics="never"))
            yield model
        if reduce:
            average_of_model([c for _, c in collectors.values()])
        without = _finish(collectors, snapshots)
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        raise
    if without:
        warnings.warn(
            f"calibration_mode: no data reached {', '.join(dict.fromkeys(without))}; they keep the scale that "
            "they had. Run batches through the model inside the context",
            UserWarning,
            stacklevel=3,
        )


def _finish(collectors: dict[int, tuple[str, Any]], snapshots: list[_Snapshot]) -> list[str]:
    """Fix the scales; the names of quantizers without data."""
    without: list[str] = []
    for (name, collector), snapshot in zip(collectors.values(), snapshots, strict=True):
        collector.tell_left_out()
        if not collector.has_data:
            snapshot.restore()
            without.append(name)
        elif isinstance(collector, CollectThenLearn):
            collector.finish_collection()
    return without
