"""Layers with one quantizer of each kind, and what they give: by themselves, and by the composition of the quantizer's parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import qframework
from qframework.layers import QuantIdentity, QuantLinear, QuantReLU, TruncQuantAccumulator
from qframework.quant_tensor import IntQuantTensor, QuantTensor
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Fp8e4m3OCPWeightPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMinMaxInit,
    Int8BiasPerTensorFloatInternalScaling,
    Int8DynamicActPerRowFloat,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerChannelFixedPoint,
    Int8WeightPerChannelFloat,
    Int8WeightPerGroupFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    MXFloat8e4m3Weight,
    NF4WeightPerChannelFloat,
    RoundTo8bit,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
    ShiftRoundSaturateTo8bit,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloat,
)

FEATURES, CHANNELS, BATCH = 16, 6, 5
EVALUATION = ("eval", "frozen")


class Kind(NamedTuple):
    """A kind of quantizer.

    Attributes:
        make: a layer with one.
        proxy: name of its proxy in the layer.
        calls: how many of them a run makes in training.
        phases: in which a layer of this kind is looked at.
    """

    make: Callable[[], Any]
    proxy: str
    calls: int = 1
    phases: tuple[str, ...] = ("train", *EVALUATION)


def sample(seed: int = 0) -> Tensor:
    """Some activations."""
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))


def accumulated(seed: int = 0) -> IntQuantTensor:
    """Some integers of 16 bits, with a scale."""
    q = (sample(seed) * 5000).round().clamp(-32768, 32767)
    return IntQuantTensor(q * 0.125, 0.125, 0.0, 16.0, signed=True)


def _weight(quantizer: Any, **keywords: Any) -> Kind:
    names = {f"weight_{k}": v for k, v in keywords.items()}
    return Kind(
        lambda: QuantLinear(FEATURES, CHANNELS, bias=False, weight_quant=quantizer, **names),
        "weight_quant",
    )


def _collecting(layer: Any, quantizer: Any) -> Kind:
    def make() -> Any:
        return layer(quantizer, return_quant_tensor=True, collect_stats_steps=2)

    return Kind(make, "act_quant", 3, ("train",))


def _learned(layer: Any, quantizer: Any) -> Kind:
    def make() -> Any:
        made = layer(quantizer, return_quant_tensor=True, collect_stats_steps=1)
        for seed in range(2):
            made(sample(seed))
        return made

    return Kind(make, "act_quant")


def _bias(quantizer: Any) -> Kind:
    def make() -> Any:
        reader = {"input_quant": Int8ActPerTensorFloatMinMaxInit, "input_min_val": -3.0}
        made = QuantLinear(FEATURES, CHANNELS, bias_quant=quantizer, input_max_val=3.0, **reader)
        with torch.no_grad():
            made.bias.copy_(torch.linspace(-1, 1, CHANNELS))
        return made

    return Kind(make, "bias_quant")


KINDS = {
    "weight_absmax": _weight(Int8WeightPerTensorFloat),
    "weight_per_channel": _weight(Int8WeightPerChannelFloat),
    "weight_fixed_point": _weight(Int8WeightPerChannelFixedPoint),
    "weight_zero_point": _weight(ShiftedUint8WeightPerTensorFloat),
    "weight_learned": _weight(Int8WeightPerTensorFloat, scaling_impl_type="parameter_from_stats"),
    "weight_width": _weight(Int8WeightPerTensorFloat, bit_width_impl_type="parameter"),
    "weight_binary": _weight(SignedBinaryWeightPerTensorConst),
    "weight_minifloat": _weight(Fp8e4m3OCPWeightPerTensorFloat),
    "weight_groups": _weight(Int8WeightPerGroupFloat, group_size=8),
    "weight_mx": _weight(MXFloat8e4m3Weight, group_size=8),
    "weight_codebook": _weight(NF4WeightPerChannelFloat),
    "relu_collecting": _collecting(QuantReLU, Uint8ActPerTensorFloat),
    "relu_learned": _learned(QuantReLU, Uint8ActPerTensorFloat),
    "signed_learned": _learned(QuantIdentity, Int8ActPerTensorFloat),
    "zero_point_collecting": _collecting(QuantIdentity, ShiftedUint8ActPerTensorFloat),
    "zero_point_learned": _learned(QuantIdentity, ShiftedUint8ActPerTensorFloat),
    "dynamic": Kind(
        lambda: QuantIdentity(Int8DynamicActPerTensorFloat, return_quant_tensor=True), "act_quant"
    ),
    "dynamic_rows": Kind(
        lambda: QuantIdentity(Int8DynamicActPerRowFloat, return_quant_tensor=True), "act_quant"
    ),
    "minifloat_learned": _learned(QuantIdentity, Fp8e4m3OCPActPerTensorFloat),
    "bias_of_products": _bias(Int32Bias),
    "bias_by_itself": _bias(Int8BiasPerTensorFloatInternalScaling),
    "truncation": Kind(lambda: TruncQuantAccumulator(RoundTo8bit), "trunc_quant"),
    "shift": Kind(
        lambda: TruncQuantAccumulator(ShiftRoundSaturateTo8bit, collect_stats_steps=2),
        "trunc_quant",
        3,
        ("train",),
    ),
}


def layer_of(kind: str) -> Any:
    """A layer of a kind, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind].make()


def proxy_of(kind: str, layer: Any) -> Any:
    """The proxy that is looked at."""
    return getattr(layer, KINDS[kind].proxy)


# ------------------------------------------------------------ what they give

#: Tensors by what they are: values, which are equal bit for bit, and ``grad ...`` and so on, which are close.
Outcome = dict[str, Tensor]
Quantize = Callable[[str, Any, Tensor], Outcome]


def by_layer(kind: str, layer: Any, x: Tensor) -> Outcome:
    """What the layer gives, by whichever form its quantizers run."""
    proxy = KINDS[kind].proxy
    if proxy == "weight_quant":
        return {"out": layer(x), **_fields(layer.quant_weight())}
    if proxy == "bias_quant":
        return {"out": layer(x)}
    return _fields(layer(_integers(x) if proxy == "trunc_quant" else x))


def by_parts(kind: str, layer: Any, x: Tensor) -> Outcome:
    """The same by a call of the tensor quantizer itself, behind the activation function."""
    name = KINDS[kind].proxy
    proxy = getattr(layer, name)
    if name == "act_quant":
        activation = proxy.activation_impl
        x = x if activation is None else activation(x)
        return _fields(proxy._wrap(proxy.tensor_quant(x), x))
    if name == "trunc_quant":
        q = _integers(x)
        found = proxy.tensor_quant(q.value, q.scale, q.zero_point, q.bit_width, q.signed)
        return dict(zip(IntQuantTensor.tensor_names, found, strict=True))
    if name == "weight_quant":
        q = proxy._wrap(proxy.tensor_quant(layer.weight), None, layer.weight)
        return {"out": F.linear(x, q.value), **_fields(q)}
    read, weight = layer.input_quant(x), layer.quant_weight()
    scales = [read.scale * weight.scale] if proxy.requires_input_scale else []
    return {"out": F.linear(read.value, weight.value, proxy.tensor_quant(layer.bias, *scales)[0])}


def _integers(x: Tensor) -> IntQuantTensor:
    q = accumulated()
    return q.set(value=q.value + (x - x.detach()))  # the integers, with a gradient to ``x``


def _fields(q: QuantTensor) -> Outcome:
    return {name: getattr(q, name) for name in q.tensor_names}


class Snapshot:
    """What a layer holds, to be put back in place, so that what was planned stays.

    Args:
        layer: in any state.
    """

    _NOTES = ("switched", "follows", "seen", "training")

    def __init__(self, layer: Any) -> None:
        tensors = (*layer.named_parameters(), *layer.named_buffers())
        self.tensors = [(name, t, t.detach().clone()) for name, t in tensors]
        self.notes = [
            (m, n, vars(m)[n]) for m in layer.modules() for n in self._NOTES if n in vars(m)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        for _, tensor, before in self.tensors:
            tensor.copy_(before)
            tensor.grad = None
        for module, name, before in self.notes:
            setattr(module, name, before)

    def state(self) -> Outcome:
        """What the tensors are now."""
        return {f"state {name}": t.detach().clone() for name, t, _ in self.tensors}


def outcome(
    kind: str, layer: Any, phase: str, quantize: Quantize, snapshot: Snapshot
) -> Outcome | type[Exception]:
    """Results, gradients and state of a run; the error where it fails.

    Args:
        kind: of the layer.
        layer: in the state of ``snapshot``, which it is put back into.
        phase: ``'train'``, ``'eval'`` or ``'frozen'``; by parts, nothing is frozen.
        quantize: :func:`by_layer` or :func:`by_parts`.
        snapshot: of the layer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if phase == "train":
                return _trained(kind, layer.train(), quantize, snapshot)
            layer.eval()
            with torch.no_grad(), _frozen(layer, phase == "frozen" and quantize is by_layer):
                found = [_detached(quantize(kind, layer, sample(seed))) for seed in range(2)]
                return _numbered(found)
    except Exception as error:
        return type(error)
    finally:
        qframework.unfreeze(layer)
        snapshot.restore()


@contextmanager
def _frozen(layer: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with qframework.frozen(layer):
        yield


def _trained(kind: str, layer: Any, quantize: Quantize, snapshot: Snapshot) -> Outcome:
    found = []
    for seed in range(KINDS[kind].calls):
        x = sample(seed).requires_grad_()
        results = quantize(kind, layer, x)
        loss = sum((t * _upstream(t)).sum() for t in results.values())
        if loss.requires_grad:
            loss.backward()
        found.append({**_detached(results), "grad input": _gradient(x)})
    gradients = {f"grad {n}": _gradient(p) for n, p in layer.named_parameters()}
    return {**_numbered(found), **gradients, **snapshot.state()}


def _upstream(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)


def _gradient(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t.grad is None else t.grad.clone()


def _detached(results: Outcome) -> Outcome:
    return {name: t.detach().clone() for name, t in results.items()}


def _numbered(found: list[Outcome]) -> Outcome:
    return {f"{name} {i}": t for i, results in enumerate(found) for name, t in results.items()}


def difference(a: Any, b: Any) -> str | None:
    """What differs between two outcomes, for people; None where they are the same."""
    if isinstance(a, type) or isinstance(b, type):
        return None if a is b else f"{_short(a)} and {_short(b)}"
    if a.keys() != b.keys():
        return f"{sorted(a)} and {sorted(b)}"
    for name, first in a.items():
        second = b[name]
        if first.shape != second.shape or first.dtype != second.dtype:
            return f"{name}: {first.dtype} {first.shape} and {second.dtype} {second.shape}"
        if name.startswith("grad"):
            # A sum of numbers of both signs may come out near 0: relative to the size that it has by chance.
            size = max(first.double().nan_to_num(0, 0, 0).norm().item(), 0.1)
            same = torch.allclose(first, second, rtol=0, atol=1e-4 * size, equal_nan=True)
        else:
            same = torch.equal(first.nan_to_num(nan=1e30), second.nan_to_num(nan=1e30))
        if not same:
            return f"{name}: {first.flatten()[:4].tolist()} and {second.flatten()[:4].tolist()}"
    return None


def _short(a: Any) -> str:
    return a.__name__ if isinstance(a, type) else "a result"
