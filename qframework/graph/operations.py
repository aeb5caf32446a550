"""How many multiply-accumulates the modules of a model do, and between how many bits."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qframework.graph.accumulators import Codes, bias_integers, codes_of_role, codes_of_tensor
from qframework.graph.widths import bits_of_proxy, bits_of_tensor, inside_quantizers
from qframework.layers import TransposedLinear
from qframework.proxy import QuantProxy
from qframework.quant_tensor import QuantTensor

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FLOAT = 32.0

#: Modules that keep the bits of what they are given.
_KEEPING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.UpsamplingNearest2d,
)  # fmt: skip


class Product(NamedTuple):
    """Multiply-accumulates between factors of so many bits."""

    macs: int
    input_bits: float
    weight_bits: float


class Operations:
    """What one module does in all of its calls.

    Attributes:
        products: of all calls.
        input_codes: integers of the input of the last call; None where they aren't.
        bias_integers: of the quantized bias in the last call; None without one.
    """

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.input_codes: Codes | None = None
        self.bias_integers: list[int] | None = None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates; None when there was no call."""
        return sum(p.macs for p in self.products) if self.products else None

    @property
    def bops(self) -> float | None:
        """The sum of multiply-accumulates times the bits of both factors."""
        found = sum(p.macs * p.input_bits * p.weight_bits for p in self.products)
        return found if self.products else None

    @property
    def input_bits(self) -> float | None:
        """Bits of the first factor, the mean over multiply-accumulates."""
        return self._mean([p.input_bits for p in self.products])

    @property
    def weight_bits(self) -> float | None:
        """Bits of the second factor, the mean over multiply-accumulates."""
        return self._mean([p.weight_bits for p in self.products])

    def _mean(self, bits: list[float]) -> float | None:
        if len(set(bits)) < 2 or not self.macs:
            return bits[0] if bits else None
        return sum(p.macs * b for p, b in zip(self.products, bits, strict=True)) / self.macs


class _Known:
    """The bits of tensors that quantized layers have made, for as long as nothing is written into them."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[Any, int, float]] = {}  # kept alive: an id may come again
        self.integers: dict[int, Codes | None] = {}

    def add(self, x: Any, bits: float, codes: Codes | None) -> None:
        if isinstance(x, (Tensor, QuantTensor)):
            self.tensors[id(x)] = (x, getattr(x, "_version", 0), bits)
            self.integers[id(x)] = codes

    def codes(self, x: Any) -> Codes | None:
        known = self.bits(x) is not None and id(x) in self.integers
        return self.integers[id(x)] if known else codes_of_tensor(x)

    def bits(self, x: Any) -> float | None:
        _, version, bits = self.tensors.get(id(x), (None, 0, None))
        if bits is not None:
            return bits if getattr(x, "_version", 0) == version else None
        if isinstance(x, QuantTensor) and not x.value.is_meta:
            return bits_of_tensor(x)
        return None


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modules have the attributes and buffers again that they had."""
    before = {m: (dict(vars(m)), dict(m._buffers)) for m in model.modules()}
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about quantizers that have seen no data
            yield
    finally:
        for module, (attributes, buffers) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def count_operations(
    model: nn.Module, example_input: tuple[Any, ...]
) -> dict[nn.Module, Operations]:
    """What each module does for an input; the model stays as it is."""
    counts: dict[nn.Module, Operations] = {}
    known = _Known()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = [*bound.args, *bound.kwargs.values()]
        products = list(_products(module, given, output, known.bits))
        if products:
            found = counts.setdefault(module, Operations())
            found.products += products
            found.input_codes = known.codes(given[0])
            found.bias_integers = bias_integers(module)
        made, codes = None, None
        for attribute in ("output_quant", "act_quant", "trunc_quant"):
            bits = _bits_of_role(module, attribute)
            if bits is not None:
                made, codes = bits, codes_of_role(module, attribute)
        if made is None and isinstance(module, _KEEPING) and given:
            made, codes = known.bits(given[0]), known.codes(given[0])
        if made is not None:
            known.add(output, made, codes)

    inner = inside_quantizers(model)
    handles = []
    with _unchanged(model):
        try:
            for module in model.modules():
                if module not in inner:
                    handles.append(module.register_forward_hook(look, with_kwargs=True))
            model.eval()
            with torch.no_grad():
                model(*example_input)
        finally:
            for handle in handles:
                handle.remove()
    return counts


def _bits_of_role(module: nn.Module, attribute: str) -> float | None:
    proxy = module._modules.get(attribute)
    if isinstance(proxy, QuantProxy) and proxy.is_quant_enabled:
        return bits_of_proxy(proxy)
    return None


def _weight(module: nn.Module) -> float:
    bits = _bits_of_role(module, "weight_quant")
    return bits_of_tensor(module.weight) if bits is None else bits  # type: ignore[arg-type]


def _products(
    module: Any, given: list[Any], output: Any, bits: Callable[[Any], float | None]
) -> Iterator[Product]:
    """The products of one call."""

    def operand(attribute: str, x: Any = None) -> float:
        found = _bits_of_role(module, attribute)
        return found or bits(x) or _FLOAT

    if isinstance(module, TransposedLinear):
        macs = output.numel() * module.in_features
        yield Product(macs, operand("input_quant", given[0]), _weight(module))
    elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        macs = output.numel() * math.prod(module.weight.shape[1:])
        yield Product(macs, operand("input_quant", given[0]), _weight(module))
    elif isinstance(module, _TRANSPOSED):
        macs = given[0].numel() * math.prod(module.weight.shape[1:])
        yield Product(macs, operand("input_quant", given[0]), _weight(module))
    elif isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        x = getattr(given[0], "data", given[0])  # of a PackedSequence
        for name, weight in module.named_parameters():
            if "weight" in name:
                macs = x.numel() // x.shape[-1] * weight.numel()
                yield Product(macs, bits(given[0]) or _FLOAT, bits_of_tensor(weight))
    elif hasattr(module, "direction_class"):
        yield from _recurrent(module, given[0], bits(given[0]) or _FLOAT)
    elif isinstance(module, nn.MultiheadAttention):
        yield from _multihead(module, given[:3], bits)
    elif hasattr(module, "attn_output_weights_quant"):
        q, k, v = given[:3]
        yield from _attention(module, q.numel() * k.shape[-2], output.numel() * v.shape[-2])
    elif "other_quant" in module._modules:
        macs = output.numel() * given[0].shape[-1]
        yield Product(macs, operand("input_quant", given[0]), operand("other_quant", given[1]))


def _recurrent(module: Any, x: Any, given_bits: float) -> Iterator[Product]:
    """The products of our recurrent layers, whose parts have quantizers of their own."""
    steps = x.numel() // x.shape[-1]
    for part in module.modules():
        io_bits = _bits_of_role(part, "io_quant")
        given_bits = given_bits if io_bits is None else io_bits
        if "weight_quant" in part._modules:
            yield Product(steps * part.weight.numel(), given_bits, _weight(part))


def _multihead(
    module: Any, given: list[Any], bits: Callable[[Any], float | None]
) -> Iterator[Product]:
    """The products of heads; those of the projections too where they aren't modules."""
    query, key, value = given
    size = module.embed_dim
    if not isinstance(getattr(module, "attn_output_weights_quant", None), nn.Module):
        weight_bits = bits_of_tensor(module.out_proj.weight)
        for x in (query, key, value):
            yield Product(x.numel() * size, bits(x) or _FLOAT, weight_bits)
        yield Product(query.numel() * size, _FLOAT, weight_bits)
    axis = 0 if key.dim() == 2 or not module.batch_first else 1
    keys = key.shape[axis] + (module.bias_k is not None) + bool(module.add_zero_attn)
    yield from _attention(module, query.numel() * keys, query.numel() * keys)


def _attention(module: Any, scores: int, values: int) -> Iterator[Product]:
    """Queries times keys, and weights times values."""

    def held(name: str) -> float:
        holder = module._modules.get(f"{name}_quant")
        return (holder is not None and _bits_of_role(holder, "act_quant")) or _FLOAT

    yield Product(scores, held("q_scaled"), held("k_transposed"))
    yield Product(values, held("attn_output_weights"), held("v"))
