"""What every quantizer has to do, as a class of tests to derive from."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qframework.core.codebook import CodebookQuant
from qframework.core.float_quant import FloatQuant
from qframework.functional import codebook_quantize, join_groups
from qframework.inject.resolver import Resolver
from qframework.layers import QuantIdentity, QuantLinear, TruncQuantAccumulator
from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    TruncQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.quant_tensor import GroupwiseIntQuantTensor, IntQuantTensor, QuantTensor
from qframework.quantizers import Int8ActPerTensorFloat, Uint8ActPerTensorFloat
from qframework.testing.check import check, close, refuses, same, slow

_PREFIX = {"weight": "weight_", "bias": "bias_", "activation": "", "truncation": ""}
_NEAREST = ("ROUND", None)


class QuantizerContract:
    """Derive, name a quantizer, and pytest runs all the checks.

    ::

        class TestMyQuantizer(QuantizerContract):
            quantizer = MyQuantizer

    The role (weight, bias, activation, truncation) is that of the quantizer's ``proxy_class``. A check that fails says in one line what was
    promised and why it isn't so. Those that compile have the mark ``slow``, which registers itself.

    Attributes:
        quantizer: the class.
        keywords: names that a user has to bind, without a prefix.
        shape: of the input that the checks use; rows of 16 features.
        idempotent: whether values that are on the grid have to stay when they are quantized by the same scale.
        random: whether the quantizer draws numbers. Calls that are compared then start from the same seed, and what a
            compiler makes, which draws its own, is compared by shape and to within a step.
    """

    quantizer: ClassVar[Any] = None
    keywords: ClassVar[Mapping[str, Any]] = {}
    shape: ClassVar[tuple[int, ...]] = (4, 16)
    idempotent: ClassVar[bool] = True
    random: ClassVar[bool] = False

    # ------------------------------------------------------------ what the checks are made of

    def role(self) -> str:
        """What the quantizer is for."""
        proxy = Resolver(self.quantizer, dict(self.keywords)).read("proxy_class")
        for role, kind in (
            ("weight", WeightQuantProxyFromInjector),
            ("bias", BiasQuantProxyFromInjector),
            ("activation", ActQuantProxyFromInjector),
            ("truncation", TruncQuantProxyFromInjector),
        ):
            if issubclass(proxy, kind):
                return role
        raise TypeError(
            f"{self.quantizer.__name__}: no check knows its proxy_class {proxy.__name__}"
        )

    def subject(self) -> str:
        """What failures are told of."""
        return str(getattr(self.quantizer, "__name__", self.quantizer))

    def layer(self, **more: Any) -> nn.Module:
        """A layer with the quantizer, before any data."""
        role = self.role()
        names = {_PREFIX[role] + k: v for k, v in {**self.keywords, **more}.items()}
        if role == "activation":
            return QuantIdentity(self.quantizer, return_quant_tensor=True, **names)
        if role == "truncation":
            return TruncQuantAccumulator(self.quantizer, **names)
        features = self.shape[-1]
        if role == "bias":
            biased = QuantLinear(
                features, 8, bias_quant=self.quantizer, input_quant=Int8ActPerTensorFloat, **names
            )
            with torch.no_grad():
                biased.bias.mul_(
                    1e-3
                )  # small beside the product of two scales, so that none saturates
            return biased
        proxy = Resolver(self.quantizer, dict(self.keywords)).read("proxy_class")
        reader = Uint8ActPerTensorFloat if proxy.requires_quant_input else None
        return QuantLinear(features, 8, weight_quant=self.quantizer, input_quant=reader, **names)

    def sample(self, seed: int = 0) -> Any:
        """An input of the layer: a float tensor, for accumulators a quantized one of 16 bits."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        if self.role() != "truncation":
            return x
        q = (x * 5000).round().clamp(-32768, 32767)
        return IntQuantTensor(q * 0.125, 0.125, 0.0, 16.0, signed=True)

    def ready(self, **more: Any) -> nn.Module:
        """The layer in evaluation mode, after it has seen data."""
        layer = self.layer(**more)
        layer(self.sample(0)), layer(self.sample(1))
        return layer.eval()

    def quantized(self, layer: Any) -> Any:
        """The quantized tensor that the quantizer makes."""
        role, x = self.role(), self.sample()
        if role in ("activation", "truncation"):
            return layer(x)
        quant_input = layer.input_quant(x)
        weight = layer.quant_weight(quant_input)
        return weight if role == "weight" else layer.bias_quant(layer.bias, quant_input, weight)

    # ------------------------------------------------------------ the checks

    @check("a layer can be built with it, and gives a quantized tensor in training and evaluation")
    def test_builds_and_gives_a_quantized_tensor(self) -> None:
        """The quantizer resolves, runs in training and evaluation, and keeps the shape."""
        layer = self.layer()
        for out in (self.quantized(layer), self.quantized(self.ready())):
            assert isinstance(out, QuantTensor), f"it gives a {type(out).__name__}"
        assert "unresolved" not in repr(layer), f"a name can't be resolved: {layer!r}"

    @check("values are integers of its bit width, times the scale")
    def test_values_are_on_the_grid(self) -> None:
        """``value / scale + zero_point`` is an integer that the bit width holds."""
        out = self.quantized(self.ready())
        if not isinstance(out, IntQuantTensor):
            assert getattr(out, "is_valid", True), (
                "is_valid says that some value is on no grid point"
            )
            return
        steps = (out.value.double() / out.scale.double() + out.zero_point.double()).detach()
        off = (steps - steps.round()).abs().max()
        bits = float(out.bit_width.detach())
        assert off < max(1e-3, 2.0 ** (bits - 22)), f"{float(off)} of a step off the grid"
        if bits == 1 and out.signed:
            found = set(steps.round().unique().tolist())
            assert found <= {-1.0, 1.0}, f"one signed bit holds -1 and 1, and there are {found}"
            return
        low, high = (
            (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if out.signed else (0, 2**bits - 1)
        )
        least, most = float(steps.min()), float(steps.max())
        assert low - 0.5 < least and most < high + 0.5, (
            f"integers from {least:g} to {most:g}, and {bits:g} bits hold {low:g} to {high:g}"
        )

    @check(
        "what is on the grid stays there when it is quantized again (idempotent = False says that it needn't)"
    )
    def test_quantizing_again_changes_nothing(self) -> None:
        """What is on the grid stays there; by a rounding rule other than to nearest, within a step."""
        layer = self.ready()
        proxy = self._proxy(layer)
        if not self.idempotent or not _can_repeat(proxy.tensor_quant):
            return
        out = self.quantized(layer)
        again = _again(proxy.tensor_quant, out)
        if isinstance(out, (IntQuantTensor, GroupwiseIntQuantTensor)):
            step = out.scale.detach().abs()
            room = (1e-3 if proxy.rounding_mode in _NEAREST else 1.001) * step
        else:
            room = 1e-5 * out.value.detach().abs()
        off = (again - out.value).detach().abs()
        assert (off <= room + 1e-30).all(), f"a value moves by {float(off.max()):.3g}"

    @check("a gradient reaches what is quantized, and all gradients are finite")
    def test_gradients_flow_and_are_finite(self) -> None:
        """Something reaches what is quantized, and nothing that is not a number anywhere."""
        layer = self.layer()
        layer(self.sample(1))
        layer.zero_grad()
        x = self.sample()
        leaf = (x.value if isinstance(x, QuantTensor) else x).clone().requires_grad_()
        out = layer(x.set(value=leaf) if isinstance(x, IntQuantTensor) else leaf)
        (out.value if isinstance(out, QuantTensor) else out).sum().backward()
        role = self.role()
        target = {"weight": "weight", "bias": "bias"}.get(role)
        gradient = leaf.grad if target is None else getattr(layer, target).grad
        assert gradient is not None, f"none reaches the {role}; round with a function ..._ste"
        assert bool((gradient != 0).any()), f"it is 0 everywhere for the {role}; round by ..._ste"
        for name, parameter in layer.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            assert finite, f"that of {name} is infinite or NaN"

    @check("a model in bfloat16 stays in bfloat16, its scales in float32")
    def test_brain_floats_come_back_as_brain_floats(self) -> None:
        """Values keep the dtype of the model, scales stay in float32."""
        layer, x = self.ready().bfloat16(), self.sample()
        x = x.set(value=x.value.bfloat16()) if isinstance(x, IntQuantTensor) else x.bfloat16()
        out = layer(x)
        value = out.value if isinstance(out, QuantTensor) else out
        assert value.dtype == torch.bfloat16, f"values are {value.dtype}"
        assert bool(value.isfinite().all()), "some value is infinite or NaN"
        if hasattr(out, "scale"):
            assert out.scale.dtype == torch.float32, f"its scale is {out.scale.dtype}"

    @check("a state dict carries everything that a call depends on")
    def test_a_state_dict_carries_everything(self) -> None:
        """Another layer computes the same once it is loaded, and its keys are those of the first."""
        layer, other = self.ready(), self.layer().eval()
        other.load_state_dict(layer.state_dict())
        differ = other.state_dict().keys() ^ layer.state_dict().keys()
        assert not differ, f"keys depend on what has run: {sorted(differ)}"
        self._same(other, layer)

    @check("copies and pickles compute the same (random = True says that it draws)")
    def test_copies_and_pickles_compute_the_same(self) -> None:
        """``copy.deepcopy``, ``torch.save`` and ``torch.load``."""
        layer = self.ready()
        self._same(copy.deepcopy(layer), layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self._same(torch.load(file, weights_only=False), layer)

    @check("a wrong keyword is a TypeError that names it, and the right one")
    def test_wrong_keywords_are_refused(self) -> None:
        """A misspelled keyword is a TypeError that names the right one; an unknown one too."""
        refuses(lambda: self.layer(bit_widht=4), "bit_widht=4", "bit_width")
        refuses(lambda: self.layer(no_such_name=1), "no_such_name=1", "no_such_name")

    @slow
    @check("torch.compile(fullgraph=True) traces it as one graph")
    def test_traces_as_one_graph(self) -> None:
        """``torch.compile(fullgraph=True)`` takes it, training with gradients and evaluation, and gives the same."""
        layer = self.layer()
        torch.compiler.reset()
        traced: Any = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
        x = self.sample(1)
        expected, got = self._call(layer, x), self._call(traced, x)
        close(got, expected)
        value = got.value if isinstance(got, QuantTensor) else got
        if value.requires_grad:
            value.sum().backward()
        layer.eval(), traced.eval()
        close(self._call(traced, self.sample()), self._call(layer, self.sample()))

    @slow
    @check("torch.export of the layer gives the same values")
    def test_exports(self) -> None:
        """``torch.export`` of the layer in evaluation mode gives the same values."""
        layer, x = self.ready(), self.sample()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(layer, (x,))
        close(self._call(program.module(), x), self._call(layer, x))

    @slow
    @check("compiled code gives the values of eager mode")
    def test_compiled_is_eager(self) -> None:
        """``torch.compile(fullgraph=True)``, training and evaluation."""
        layer = self.layer()
        torch.compiler.reset()
        compiled: Any = torch.compile(copy.deepcopy(layer), fullgraph=True)
        self._compiled_close(compiled, layer, self.sample(1))
        layer.eval(), compiled.eval()
        self._compiled_close(compiled, layer, self.sample())

    # ------------------------------------------------------------ helpers

    def _proxy(self, layer: Any) -> Any:
        names = {"weight": "weight_quant", "bias": "bias_quant", "activation": "act_quant"}
        return getattr(layer, names.get(self.role(), "trunc_quant"))

    def _same(self, one: nn.Module, other: nn.Module) -> None:
        a, b = self._values(one), self._values(other)
        same(a, b)

    def _call(self, layer: Any, x: Any) -> Any:
        """One call; of a random quantizer from the same seed each time."""
        if not self.random:
            return layer(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return layer(x)

    def _compiled_close(self, compiled: Any, layer: Any, x: Any) -> None:
        got, expected = self._call(compiled, x), self._call(layer, x)
        if not self.random:
            close(got, expected)
            return
        value, right = (t.value if isinstance(t, QuantTensor) else t for t in (got, expected))
        assert value.shape == right.shape, f"shapes are {value.shape} and {right.shape}"
        assert value.dtype == right.dtype, f"dtypes are {value.dtype} and {right.dtype}"
        assert bool(value.isfinite().all()), "some value is infinite or NaN"
        if isinstance(expected, IntQuantTensor):
            off = ((value - right) / expected.scale).detach().abs().max()
            assert off < 1.001, f"{float(off)} steps apart"

    def _values(self, layer: nn.Module) -> Tensor:
        with torch.no_grad():
            out = self._call(layer, self.sample())
        return out.value if isinstance(out, QuantTensor) else out


def _can_repeat(quantizer: Any) -> bool:
    """Whether the quantizer's rounding can be called by itself."""
    if not hasattr(quantizer, "int_quant"):
        return isinstance(quantizer, (FloatQuant, CodebookQuant))
    return getattr(quantizer.int_quant.float_to_int_impl, "learned_round_impl", None) is None


def _again(quantizer: Any, out: Any) -> Tensor:
    """The values of a quantized tensor, quantized once more on their own grid."""
    scale, zero_point = (
        getattr(out, "scale_", out.scale),
        getattr(out, "zero_point_", out.zero_point),
    )
    if isinstance(quantizer, FloatQuant):
        again = quantizer.quantize(quantizer.input_view_impl(out.value), scale)
    elif isinstance(quantizer, CodebookQuant):
        again = codebook_quantize(quantizer.input_view_impl(out.value), scale, out.codebook)
    else:
        again = quantizer.int_quant(scale, zero_point, out.bit_width, out.value)
    if again.shape == out.value.shape:
        return again
    axis = getattr(out, "group_dim", getattr(out, "block_dim", None))
    return join_groups(again, axis, out.value.shape)  # type: ignore[arg-type]
