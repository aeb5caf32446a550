"""What every quantized layer has to do, as a class of tests to derive from."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qframework.quant_tensor import QuantTensor
from qframework.testing.check import check, close, plain, refuses, same, slow


class LayerContract:
    """Derive, say how the layer is built and what it is given, and pytest runs all the checks.

    ::

        class TestMyLayer(LayerContract):
            def layer(self, **keywords):
                return MyLayer(16, 8, **keywords)

            def sample(self):
                return torch.randn(4, 16)

            def float_layer(self):  # where there is one
                return nn.Linear(16, 8)

    A check that fails says in one line what was promised and why it isn't so. Those that compile have the mark ``slow``, which registers
    itself.

    Attributes:
        prefix: of the keywords of one of its quantizers; ``""`` for layers whose keywords have none.
        without: keywords that switch off all of its quantizers.
        random: whether the layer draws numbers. Calls that are compared then start from the same seed.
    """

    prefix: ClassVar[str] = "weight_"
    without: ClassVar[Mapping[str, Any]] = {"weight_quant": None}
    random: ClassVar[bool] = False

    # ------------------------------------------------------------ what a test class says

    def layer(self, **keywords: Any) -> nn.Module:
        """The layer, built with these keywords."""
        raise TypeError(f"{type(self).__name__} has to define layer(self, **keywords)")

    def sample(self) -> Any:
        """An input, or a tuple of them."""
        raise TypeError(f"{type(self).__name__} has to define sample(self)")

    def float_layer(self) -> nn.Module | None:
        """The float layer that it stands for, whose state dict it loads; None where there is none."""
        return None

    # ------------------------------------------------------------ what the checks are made of

    def subject(self) -> str:
        """What failures are told of."""
        return type(self).__name__.removeprefix("Test")

    def call(self, layer: Any, x: Any = None) -> Any:
        """One call with the sample; of a layer that draws from the same seed each time."""
        given = self.sample() if x is None else x
        arguments = given if isinstance(given, tuple) else (given,)
        with torch.random.fork_rng(devices=[], enabled=self.random):
            if self.random:
                torch.manual_seed(0)
            return layer(*arguments)

    def values(self, layer: nn.Module, x: Any = None) -> list[Tensor]:
        """The results of a call as tensors."""
        with torch.no_grad():
            return _flat(self.call(layer, x))

    def ready(self) -> tuple[nn.Module, Any]:
        """The layer in evaluation mode, after it has seen data, and an input."""
        layer, x = self.layer(), self.sample()
        for _ in range(2):
            self.call(layer, x)
        return layer.eval(), x

    # ------------------------------------------------------------ the checks

    @check("it runs in training and in evaluation, with results of the same shapes")
    def test_runs_in_training_and_evaluation(self) -> None:
        """And every number is finite."""
        trained = _flat(self.call(self.layer()))
        layer, x = self.ready()
        evaluated = self.values(layer, x)
        for a, b in zip(trained, evaluated, strict=True):
            assert a.shape == b.shape, f"shapes are {tuple(a.shape)} and {tuple(b.shape)}"
            assert bool(b.isfinite().all()), "some value is infinite or NaN"

    @check("evaluation changes nothing in it: a second call gives the same")
    def test_evaluates_twice_alike(self) -> None:
        """No hidden state."""
        layer, x = self.ready()
        for a, b in zip(self.values(layer, x), self.values(layer, x), strict=True):
            same(a, b)

    @check("gradients reach its parameters, and are finite")
    def test_gradients_flow_and_are_finite(self) -> None:
        """At least one parameter gets a gradient that isn't 0, or the input does."""
        layer, x = self.layer(), _leaves(self.sample())
        self.call(layer, x)
        layer.zero_grad()
        sum(t.float().square().sum() for t in _flat(self.call(layer, x))).backward()  # type: ignore[union-attr]
        found = dict(layer.named_parameters())
        found |= {
            f"input {i}": t
            for i, t in enumerate(x if isinstance(x, tuple) else (x,))
            if _is_leaf(t)
        }
        gradients = {n: p.grad for n, p in found.items() if p.grad is not None}
        assert any(bool((g != 0).any()) for g in gradients.values()), "all of them are 0 or missing"
        for name, gradient in gradients.items():
            assert bool(gradient.isfinite().all()), f"that of {name} is infinite or NaN"

    @check("a layer in bfloat16 gives finite bfloat16 values")
    def test_brain_floats_come_back_as_brain_floats(self) -> None:
        """Inputs, parameters and results."""
        layer, x = self.ready()
        for value in self.values(layer.bfloat16(), _as(x, torch.bfloat16)):
            assert value.dtype == torch.bfloat16, f"values are {value.dtype}"
            assert bool(value.isfinite().all()), "some value is infinite or NaN"

    @check("a state dict carries everything that a call depends on")
    def test_a_state_dict_carries_everything(self) -> None:
        """Another layer computes the same once it is loaded, and its keys are those of the first."""
        (layer, x), other = self.ready(), self.layer().eval()
        differ = other.state_dict().keys() ^ layer.state_dict().keys()
        assert not differ, f"keys depend on what has run: {sorted(differ)}"
        other.load_state_dict(layer.state_dict())
        self._alike(other, layer, x)

    @check("copies and pickles compute the same (random = True says that it draws)")
    def test_copies_and_pickles_compute_the_same(self) -> None:
        """``copy.deepcopy``, ``torch.save`` and ``torch.load``."""
        layer, x = self.ready()
        self._alike(copy.deepcopy(layer), layer, x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self._alike(torch.load(file, weights_only=False), layer, x)

    @check("a wrong keyword is a TypeError that names it, and the right one")
    def test_wrong_keywords_are_refused(self) -> None:
        """``bit_widht`` with the prefix of the layer's keywords, and a name that nothing is like."""
        wrong, right = f"{self.prefix}bit_widht", f"{self.prefix}bit_width"
        refuses(lambda: self.layer(**{wrong: 4}), f"{wrong}=4", right)
        refuses(lambda: self.layer(no_such_name=1), "no_such_name=1", "no_such_name")

    @check("it prints its quantizers")
    def test_prints_its_quantizers(self) -> None:
        """In a few lines, before data and after."""
        for layer in (self.layer(), self.ready()[0]):
            text = repr(layer)
            assert "unresolved" not in text, f"a name can't be resolved: {text!r}"

    @check("without its quantizers it computes what the float layer does")
    def test_without_quantizers_it_is_the_float_layer(self) -> None:
        """And loads its state dict, strictly."""
        reference = self.float_layer()
        if reference is None:
            return
        layer, x = self.layer(**self.without), self.sample()
        layer.load_state_dict(reference.state_dict())
        for a, b in zip(
            self.values(layer.eval(), x), self.values(reference.eval(), x), strict=True
        ):
            close(a, b)

    @slow
    @check("torch.compile(fullgraph=True) traces it as one graph, with the values of eager mode")
    def test_traces_as_one_graph(self) -> None:
        """Training, then evaluation."""
        layer, x = self.layer(), self.sample()
        torch.compiler.reset()
        traced: Any = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
        self._close(_flat(self.call(traced, x)), _flat(self.call(layer, x)))
        layer.eval(), traced.eval()
        self._close(_flat(self.call(traced, x)), _flat(self.call(layer, x)))

    @slow
    @check("torch.export of the layer gives the same values")
    def test_exports(self) -> None:
        """In evaluation mode."""
        layer, x = self.ready()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(layer, x if isinstance(x, tuple) else (x,))
        self._close(self.values(program.module(), x), self.values(layer, x))

    # ------------------------------------------------------------ helpers

    def _alike(self, one: nn.Module, other: nn.Module, x: Any) -> None:
        for a, b in zip(self.values(one, x), self.values(other, x), strict=True):
            same(a, b)

    @staticmethod
    def _close(one: list[Tensor], other: list[Tensor]) -> None:
        for a, b in zip(one, other, strict=True):
            close(a, b)


def _flat(result: Any) -> list[Tensor]:
    """All tensors of a result."""
    if isinstance(result, (Tensor, QuantTensor)):
        return [plain(result)]
    if isinstance(result, Mapping):
        result = list(result.values())
    return [t for part in result or () for t in _flat(part)]


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _leaves(x: Any) -> Any:
    """The same inputs, with gradients where they are floats."""
    if isinstance(x, tuple):
        return tuple(_leaves(t) for t in x)
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def _as(x: Any, dtype: torch.dtype) -> Any:
    """The same inputs, floats in another dtype."""
    if isinstance(x, tuple):
        return tuple(_as(t, dtype) for t in x)
    if isinstance(x, (Tensor, QuantTensor)) and plain(x).is_floating_point():
        return x.to(dtype)
    return x
