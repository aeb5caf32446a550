"""The first layer and tensor in which something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.inspect.grid import grid_of
from qframework.inspect.places import WHOLE, places
from qframework.proxy import QuantProxy
from qframework.quant_tensor import QuantTensor, dequantize


@dataclass(frozen=True)
class Anomaly:
    """What went wrong.

    Attributes:
        layer: name of the layer in the model.
        tensor: ``input``, ``output``, a parameter's name, ``scale of weight``, ``gradient of weight``.
        kind: ``"nan"``, ``"infinite"``, ``"saturated"`` or ``"one code"``.
        share: of the elements that are concerned.
        call: which call of the model, from 1.
    """

    layer: str
    tensor: str
    kind: str
    share: float
    call: int

    def __str__(self) -> str:
        what = {
            "nan": f"{self.share:.2%} of it is NaN",
            "infinite": f"{self.share:.2%} of it is infinite",
            "saturated": f"{self.share:.2%} of its values are beyond the grid",
            "one code": "all values have become one code",
        }[self.kind]
        return f"{self.layer}, {self.tensor}: {what} (call {self.call}). {_REMEDIES[self.kind]}"


_REMEDIES = {
    "nan": "Look at what this layer is given: a learning rate that is too large, a division by zero or a log of zero",
    "infinite": "Look for an overflow: half precision, a scale that has become 0, a learning rate that is too large",
    "saturated": "Calibrate again on data like this, use a higher percentile or a learned scale, or more bits",
    "one code": "The scale is far too large for these values, or the values are constant: calibrate again, use more bits",
}


class AnomalyError(RuntimeError):
    """Something went wrong in a layer.

    Attributes:
        anomaly: what and where.
    """

    def __init__(self, anomaly: Anomaly) -> None:
        super().__init__(str(anomaly))
        self.anomaly = anomaly


class Watch:
    """What :func:`detect_anomaly` yields.

    Attributes:
        anomalies: those that were found, in order; one for each layer, tensor and kind.
    """

    def __init__(self, saturation: float | None, stop: bool) -> None:
        self.anomalies: list[Anomaly] = []
        self.saturation, self.stop, self.call = saturation, stop, 0
        self._told: set[tuple[str, str, str]] = set()

    @property
    def first(self) -> Anomaly | None:
        """The first one; None when nothing went wrong."""
        return self.anomalies[0] if self.anomalies else None

    def _found(self, layer: str, tensor: str, kind: str, share: float) -> None:
        if (layer, tensor, kind) in self._told:
            return
        self._told.add((layer, tensor, kind))
        anomaly = Anomaly(layer, tensor, kind, share, max(1, self.call))
        self.anomalies.append(anomaly)
        if self.stop:
            raise AnomalyError(anomaly)

    @torch.no_grad()
    def check(self, layer: str, tensor: str, x: Any) -> bool:
        """Look for NaN and infinities; whether all is well."""
        for t in _tensors(dequantize(x)):
            if not t.is_floating_point() or bool(t.isfinite().all()):
                continue
            nan = float(t.isnan().float().mean())
            kind = "nan" if nan else "infinite"
            self._found(layer, tensor, kind, nan or float(t.isinf().float().mean()))
            return False
        return True

    @torch.no_grad()
    def check_grid(self, layer: str, tensor: str, proxy: Any, x: Tensor | None, q: Any) -> None:
        """Look at what a quantizer gave for what it was given."""
        if not isinstance(q, QuantTensor):
            return
        quantized: Any = q
        if x is not None and not self.check(layer, tensor, x):
            return
        if not self.check(layer, f"scale of {tensor}", quantized.scale):
            return
        if x is None or x.shape != quantized.value.shape or x.numel() < 2:
            return
        grid = grid_of(q, bool(proxy.is_narrow_range))
        if grid is None or not grid.clips:
            return
        at = x / quantized.scale + quantized.zero_point
        if self.saturation is not None:
            beyond = (at < grid.low - grid.room[0]) | (at > grid.high + grid.room[1])
            share = float(beyond.float().mean())
            if share > self.saturation:
                self._found(layer, tensor, "saturated", share)
        codes = quantized.value / quantized.scale
        if bool((codes.max() - codes.min()) < 0.5) and bool(x.max() > x.min()):
            self._found(layer, tensor, "one code", 1.0)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        for item in x.values():
            yield from _tensors(item)


@contextmanager
def detect_anomaly(
    model: nn.Module, saturation: float | None = 0.5, stop: bool = True
) -> Iterator[Watch]:
    """Name the first layer and tensor that become NaN or infinite, saturate, or lose all but one code.

    Looks at all values of inputs, outputs, parameters, scales and gradients, on the way forward and back, which takes its time: for
    looking for a fault, not for training.

    Args:
        model: quantized, float or both.
        saturation: share of values beyond the grid, between 0 and 1, from which a tensor is saturated; None to leave that out.
        stop: raise at the first anomaly; False to go on and collect them.

    Yields:
        A record whose ``first`` and ``anomalies`` tell what was found.

    Raises:
        AnomalyError: inside the context, at the first anomaly.
        ValueError: ``saturation`` out of range.

    Example::

        with detect_anomaly(model):
            loss(model(x), y).backward()
    """
    check_module(model, "detect_anomaly")
    if saturation is not None and not 0 <= saturation <= 1:
        raise ValueError(
            f"detect_anomaly: saturation={saturation} must be between 0 and 1, or None"
        )
    watch = Watch(saturation, stop)
    inner = {p for m in model.modules() if isinstance(m, QuantProxy) for p in m.modules()}
    handles: list[Any] = []
    try:
        handles.append(model.register_forward_pre_hook(_count(watch)))
        for name, module in model.named_modules():
            if module in inner:
                continue
            called = name or WHOLE
            handles.append(
                module.register_forward_pre_hook(_before(watch, called), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(_after(watch, called)))
        if any(isinstance(m, QuantProxy) and m.is_quant_enabled for m in model.modules()):
            for place in places(model):
                handles.append(place.proxy.register_forward_hook(_quantized(watch, place)))
        for name, parameter in model.named_parameters():
            layer, _, own = name.rpartition(".")
            hook = _gradient(watch, layer or WHOLE, own)
            if parameter.requires_grad and parameter.is_leaf:
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _count(watch: Watch) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        watch.call += 1

    return hook


def _before(watch: Watch, layer: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not watch.check(layer, "input", [args, kwargs]):
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                watch.check(layer, name, parameter)

    return hook


def _after(watch: Watch, layer: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        watch.check(layer, "output", output)

    return hook


def _quantized(watch: Watch, place: Any) -> Any:
    def hook(proxy: nn.Module, args: Any, output: Any) -> None:
        with torch.no_grad():
            x = place.before(args)
        watch.check_grid(place.layer, place.tensor, proxy, x, output)

    return hook


def _gradient(watch: Watch, layer: str, own: str) -> Any:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            watch.check(layer, f"gradient of {own}", parameter.grad)

    return hook
