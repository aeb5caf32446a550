"""Arguments for definitions, and what kernels are held to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qframework
from qframework import functional
from qframework.functional import Defined, Kernel, compute_dtype


def values(*shape: int, step: float = 1 / 64, seed: int = 1) -> Tensor:
    """Numbers whose quotients by a power of two are exact, so that float32 and float64 round alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.round(torch.randn(shape, generator=generator) * 2 / step) * step


def listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The results of a function as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


class Case(NamedTuple):
    """Arguments of a function, made of tensors that are differentiated.

    Attributes:
        name: that of the function, and what the case is about.
        values: tensors in the dtype of a model.
        numbers: tensors in the dtype of quantizers.
        arguments: from both, in order, to all arguments of the function.
        differentiated: how many of the results have a gradient; None for all.
    """

    name: str
    values: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]
    arguments: Callable[..., tuple]
    differentiated: int | None = None

    @property
    def function(self) -> Defined:
        """The function, marked by :func:`~qframework.functional.defined`."""
        return getattr(functional, self.name.split(":")[0])

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """The tensors, in the dtypes that go with a model of ``dtype``."""
        found = [t.to(dtype) for t in self.values]
        return found + [t.to(compute_dtype(dtype)) for t in self.numbers]

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """The tensors, each with a gradient of its own."""
        return [t.clone().requires_grad_() for t in self.tensors(dtype)]

    def serving(self, tensors: list[Tensor]) -> list[Kernel]:
        """The kernels that take arguments made of these tensors."""
        arguments = self.arguments(*tensors)
        found = [kernel for kernel in self.function.kernels if kernel.serves(*arguments)]
        return [kernel for kernel in found if kernel.run(*arguments) is not NotImplemented]

    def run(self, kernel: Kernel, tensors: list[Tensor]) -> list[Tensor]:
        """The results of a kernel."""
        return listed(kernel.run(*self.arguments(*tensors)))

    def define(self, tensors: list[Tensor]) -> list[Tensor]:
        """The results by the definition, and by those of all that it calls."""
        with qframework.settings.use(kernels="reference"):
            return listed(self.function.definition(*self.arguments(*tensors)))


def upstream(results: list[Tensor], *batch: int) -> list[Tensor]:
    """Gradients that come from behind, the same ones for results of the same shapes."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((*batch, *r.shape), generator=generator).to(r.dtype) for r in results]


def gradients(results: list[Tensor], leaves: list[Tensor], given: list[Tensor], **how: Any) -> Any:
    """The gradients of all leaves, zeros where there are none."""
    return torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True, **how)  # fmt: skip


def assert_near(found: Any, expected: Any, tolerance: float, size: float = 0.0) -> None:
    """Tensors differ by at most a fraction of the norm of the expected ones.

    Args:
        found: tensors.
        expected: likewise.
        tolerance: the fraction.
        size: what the norm is at least. A sum of numbers of both signs may come out near 0, and is no more exact than it would
            be at the size that it has by chance.
    """
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.double() - b).norm().item()
        assert error <= tolerance * max(b.norm().item(), size), f"{i}: {error} beside {b.norm()}"


def assert_as_defined(
    function: Callable[..., Any],
    *tensors: Tensor,
    expected: Callable[..., Any] | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Values are those of the definition bit for bit, gradients those that it has in float64.

    Args:
        function: of the tensors, that calls what has kernels.
        *tensors: are differentiated.
        expected: what ``function`` means; ``function`` itself without kernels where None.
        tolerance: of gradients, relative to their norm.
    """
    leaves = [t.clone().requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    results = listed(function(*leaves))
    with qframework.settings.use(kernels="reference"):
        exact = listed((expected or function)(*wide))
        for result, same in zip(results, listed((expected or function)(*tensors)), strict=True):
            assert torch.equal(result, same)
    given = upstream(results)
    size = max(u.double().norm().item() for u in given)
    found = gradients(results, leaves, given)
    assert_near(found, gradients(exact, wide, [u.double() for u in given]), tolerance, size)


def kept_by(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call keeps for the backward pass."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = function()
    del results
    return kept
