"""How the activations of a recurrent cell are quantized at each step.

While statistics are collected each step goes through the proxies. Once scales are known they are read once for a
sequence, and quantizers of neighbouring columns work together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from qframework.configuration import settings
from qframework.core.bit_width import BitWidthConst
from qframework.core.function_wrapper import Identity
from qframework.core.quant import IntQuant, RescalingIntQuant
from qframework.core.zero_point import ZeroZeroPoint
from qframework.functional import Range, fake_quantize, is_fused
from qframework.functional.autograd import transforms_active, version_of
from qframework.proxy import ActQuantProxyFromInjector
from qframework.proxy.base import plain
from qframework.quant_tensor import CodebookQuantTensor, FloatQuantTensor, IntQuantTensor

Step = Callable[[Tensor], Tensor]


class Recent:
    """What was last made of some tensors, for as long as the same unchanged ones come again in evaluation.

    They are results of quantizers, which keep them while nothing changes; parameters can change unseen.
    """

    def __init__(self) -> None:
        self._made_of: tuple[tuple[Tensor, int], ...] = ()
        self._result: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, ()

    def clear(self) -> None:
        """Forget it."""
        self._made_of, self._result = (), None

    def of(self, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave before."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not settings.cache:
            return make()
        if transforms_active() or any(isinstance(t, Parameter) for t in tensors):
            return make()
        known = self._made_of
        if len(known) != len(tensors) or any(
            a is not b or version_of(a) != version
            for a, (b, version) in zip(tensors, known, strict=True)
        ):
            self._result = make()
            self._made_of = tuple((t, version_of(t)) for t in tensors)
        return self._result


class Settled(NamedTuple):
    """A quantizer whose scale no longer looks at what it quantizes."""

    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor
    how: tuple[Any, ...]


def settle(proxy: ActQuantProxyFromInjector, like: Tensor) -> Settled | None:
    """Scale and range of a proxy, None where each step has to go through it."""
    quantizer: Any = proxy.tensor_quant
    if type(quantizer) is not RescalingIntQuant or not proxy.is_quant_enabled:
        return None
    if proxy._forward_hooks or proxy._forward_pre_hooks or quantizer.observer_only:
        return None
    width: Any = quantizer.msb_clamp_bit_width_impl
    rounds: Any = quantizer.int_quant
    if type(width) is not BitWidthConst or type(quantizer.zero_point_impl) is not ZeroZeroPoint:
        return None
    fixed: Any = None
    if type(rounds) is IntQuant:
        fixed = rounds.fixed_range(width.initial)
    if fixed is None or type(rounds.input_view_impl) is not Identity:
        return None
    if not _is_settled(quantizer):
        return None
    scale, zero_point, bits = proxy.parameters_for(like)
    if scale.numel() != 1:
        return None
    rule: Any = rounds.float_to_int_impl.rule
    masked: Any = rounds.tensor_clamp_impl.masked
    return Settled(
        scale if scale.dim() == 0 else scale.reshape(()), zero_point, bits, (*fixed, rule, masked)
    )


def _is_settled(quantizer: Any) -> bool:
    """Whether the scale no longer looks at the input; under a compiler, whether that is known without looking."""
    scaling = quantizer.scaling_impl
    if torch.compiler.is_compiling():
        if hasattr(scaling, "settled"):
            return bool(scaling.settled) or not quantizer.training
        return not getattr(scaling, "looks_at_input", True)
    if hasattr(scaling, "hand_over_if_due"):
        scaling.hand_over_if_due()
    return not quantizer.looks_at_input


class Unsettled(Exception):
    """Each step has to go through the proxies."""


def range_of(
    proxies: Sequence[Any], size: int, like: Tensor, recent: Recent | None = None
) -> Range | None:
    """The range of the quantizers of neighbouring columns, None where they do nothing.

    Args:
        proxies: one for each chunk of columns.
        size: columns of a chunk.
        like: a tensor on the device of the activations.
        recent: remembers the scales side by side.

    Raises:
        Unsettled: there is no such range: a quantizer still looks at its input, or they differ in more than scale and width.
    """
    if all(p.is_idle for p in proxies):
        return None
    found = [s for s in (settle(p, like) for p in proxies) if s is not None]
    if len(found) < len(proxies) or any(s.how[2:] != found[0].how[2:] for s in found):
        raise Unsettled
    first = found[0]
    if all(s.scale is first.scale for s in found):
        return Range(first.scale, first.how)
    scales = [s.scale for s in found]

    def side_by_side() -> Range:
        how = first.how
        if any(s.how != how for s in found):  # another width or sign: bounds for each column too
            bounds = zip(*(s.how[:2] for s in found), strict=True)
            low, high = (first.scale.new_tensor(b).repeat_interleave(size) for b in bounds)
            how = (low, high, *how[2:])
        return Range(torch.stack(scales).repeat_interleave(size), how)

    return side_by_side() if recent is None else recent.of(scales, side_by_side)  # type: ignore[no-any-return]


def step_of(proxies: Sequence[Any], order: Sequence[int], size: int, like: Tensor) -> Step:
    """The function that quantizes columns in chunks of ``size``, one proxy each.

    Args:
        proxies: one for each chunk.
        order: in which they see their chunks, where they collect statistics.
        size: columns of a chunk.
        like: a tensor on the device of the activations.
    """
    if all(p.is_idle for p in proxies):
        return _unchanged
    try:
        found = range_of(proxies, size, like)
    except Unsettled:
        return _through(proxies, order, size)
    assert found is not None
    return _known(found.scale, found.how, like)


def _known(scale: Tensor, how: tuple[Any, ...], like: Tensor) -> Step:
    """The function that quantizes by a scale that is known."""
    low, high, rule, _ = how
    eager = is_fused() and not torch.compiler.is_compiling()
    plainly = eager and not torch.is_grad_enabled()
    if plainly and rule == "round" and like.dtype in (torch.float32, torch.float64):
        # What fake_quantize does, without its questions: they take longer than a step's few numbers.
        return lambda x: x.div(scale).round_().clamp_(low, high).mul_(scale)

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize(x, scale, None, *how)

    return quantize


def _unchanged(x: Tensor) -> Tensor:
    return x


def _through(proxies: Sequence[Any], order: Sequence[int], size: int) -> Step:
    if len(proxies) == 1:
        return lambda x: plain(proxies[0](x))

    def quantize(x: Tensor) -> Tensor:
        chunks = list(x.split(size, dim=-1))
        for i in order:
            chunks[i] = plain(proxies[i](chunks[i]))
        return torch.cat(chunks, dim=-1)

    return quantize


#: Results whose values of several steps are one such tensor.
_ON_ONE_GRID = (IntQuantTensor, FloatQuantTensor, CodebookQuantTensor)


class OutputStep:
    """The same for a result that is kept with its scale: values of each step, one quantized tensor of all."""

    def __init__(self, proxy: Any, like: Tensor) -> None:
        self.proxy, self.records = proxy, []  # type: ignore[var-annotated]
        self.idle = proxy.is_idle
        self.settled = None if self.idle else settle(proxy, like)
        if self.settled is not None:
            self.step = _known(self.settled.scale, self.settled.how, like)

    def __call__(self, x: Tensor) -> Tensor:
        """The quantized values."""
        if self.idle:
            return x
        if self.settled is not None:
            return self.step(x)
        record = self.proxy(x)
        self.records.append(record)
        return plain(record)

    def last(self, value: Tensor) -> Any:
        """The value of the last step as a quantized tensor, where it is quantized."""
        return self.records[-1] if self.records else self.wrap(value)

    def wrap(self, value: Tensor) -> Any:
        """Values of several steps as a quantized tensor, where they are quantized."""
        if self.idle:
            return value
        if self.settled is None:
            last = self.records[-1] if self.records else self.proxy(value)
            if not isinstance(last, _ON_ONE_GRID):
                return value
            scale = last.scale
            if self.proxy.training and len(self.records) > 1:
                scale = torch.stack([r.scale for r in self.records]).mean(0)
            return last.replace(value=value, scale=scale)
        found, proxy = self.settled, self.proxy
        return IntQuantTensor.unchecked(
            value,
            found.scale,
            found.zero_point,
            found.bit_width,
            bool(proxy.is_signed),
            proxy.training,
            proxy.source,
            proxy.is_symmetric,
            proxy.has_zero,
        )


def with_batch(states: Any) -> Any:
    """States of one sequence as those of a batch of one."""
    if isinstance(states, (list, tuple)):
        return [s.unsqueeze(1) for s in states]
    return None if states is None else states.unsqueeze(1)


def state_of(states: Any, place: int) -> Any:
    """That of one layer and direction."""
    if isinstance(states, (list, tuple)):
        return states[place].squeeze(0)
    return None if states is None else states[place]
