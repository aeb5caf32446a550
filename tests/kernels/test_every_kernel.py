"""Every kernel gives what its definition gives: values bit for bit, and all kinds of derivatives."""

import importlib
import inspect
import itertools
import math
import pkgutil
from collections.abc import Iterator
from functools import partial

import integer_cases
import other_cases
import pytest
import torch
from kernel_case import Case, assert_near, gradients, listed, upstream

import qframework
from qframework import core, functional, kernels, quant_tensor
from qframework.functional import (
    Defined,
    convolution,
    gru_sequence,
    linear,
    lstm_sequence,
    rnn_sequence,
    transposed_convolution,
)
from qframework.kernels.native import tensors

CASES = [*integer_cases.CASES, *other_cases.CASES]
PRODUCTS = [linear, convolution, transposed_convolution]
SEQUENCES = [rnn_sequence, lstm_sequence, gru_sequence]
OF_SEQUENCES = [case for case in CASES if case.function in SEQUENCES]
OTHERS = [case for case in CASES if case.function not in SEQUENCES]
#: Gradients are as exact as the dtype: half precision has 8 bits.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}


def cases(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


@pytest.fixture(autouse=True, params=["fused", "auto"])
def kernels_in_use(request, monkeypatch) -> Iterator[None]:
    """Everything holds for the C++ functions too, where there is a compiler."""
    monkeypatch.setattr(tensors, "SMALLEST", 1)
    with qframework.settings.use(kernels=request.param, recompute="always"):
        yield


def serving(case: Case, dtype: torch.dtype = torch.float64) -> list[functional.Kernel]:
    """The kernels that take a case: at least one, but for half precision in sequences, which rounds after each operation."""
    found = case.serving(case.leaves(dtype))
    assert found or (dtype == torch.bfloat16 and case.function in SEQUENCES)
    return found


# ------------------------------------------------------------ the table


def defined_functions() -> list[Defined]:
    """All functions that are marked as definitions."""
    found = []
    for package in (functional, core, quant_tensor, kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for _, what in inspect.getmembers(importlib.import_module(module.name)):
                if inspect.isfunction(what) and hasattr(what, "kernels") and what not in found:
                    found.append(what)
    return found


def test_every_kernel_of_eager_mode_takes_a_case() -> None:
    idle = {
        (function.__name__, kernel.name)
        for function in defined_functions()
        for kernel in function.kernels
        if kernel.name not in ("in a graph", "several processes")  # see the tests of processes
    }
    assert len(idle) >= 15
    for case in CASES:
        idle -= {(case.function.__name__, kernel.name) for kernel in serving(case)}
    assert not idle


# ------------------------------------------------------------ values


@cases(CASES)
def test_values_are_those_of_the_definition_bit_for_bit(case) -> None:
    for dtype in TOLERANCES:
        expected = case.define(case.tensors(dtype))
        assert serving(case, dtype) is not None
        for given in (case.leaves(dtype), case.tensors(dtype)):
            for kernel in case.serving(given):
                results = case.run(kernel, given)
                assert [r.dtype for r in results] == [e.dtype for e in expected], kernel.name
                for result, e in zip(results, expected, strict=True):
                    assert torch.equal(result, e), f"{kernel.name}, {dtype}"


@cases(CASES)
def test_without_a_gradient_values_are_the_same(case) -> None:
    with torch.no_grad():
        given = case.tensors(torch.float32)
        results = listed(case.function(*case.arguments(*given)))
        for result, expected in zip(results, case.define(given), strict=True):
            assert torch.equal(result, expected) and not result.requires_grad


@cases([case for case in CASES if case.values])
def test_special_numbers_become_what_they_do_by_the_definition(case) -> None:
    specials = (math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38, -3e38)
    for dtype, special in itertools.product((torch.float32, torch.bfloat16), specials):
        leaves = case.leaves(dtype)
        leaves[0].data.view(-1)[min(11, leaves[0].numel() - 1)] = special
        expected = case.define(leaves)
        for kernel in case.serving(leaves):
            for result, e in zip(case.run(kernel, leaves), expected, strict=True):
                told = partial("{}, {}, {}: {}".format, kernel.name, dtype, special)
                torch.testing.assert_close(result, e, rtol=0, atol=0, equal_nan=True, msg=told)


# ------------------------------------------------------------ first derivatives


@cases(CASES)
def test_gradients_are_those_of_the_definition(case) -> None:
    """Of all results at once, and of each alone."""
    for dtype in TOLERANCES:
        compare_gradients(case, dtype)


def compare_gradients(case: Case, dtype: torch.dtype) -> None:
    wide = [t.detach().double().requires_grad_() for t in case.tensors(dtype)]
    expected = case.define(wide)[: case.differentiated]
    given = [u.to(r.dtype) for u, r in zip(upstream(expected), expected, strict=True)]
    for kernel in serving(case, dtype):
        leaves = case.leaves(dtype)
        results = case.run(kernel, leaves)[: case.differentiated]
        for chosen in [slice(None), *(slice(i, i + 1) for i in range(len(results)))]:
            narrow = [u.to(r.dtype) for u, r in zip(given, results, strict=True)]
            upstreams = [u.double() for u in narrow[chosen]]
            size = max(u.norm().item() for u in upstreams)
            assert_near(
                gradients(results[chosen], leaves, narrow[chosen], retain_graph=True),
                gradients(expected[chosen], wide, upstreams, retain_graph=True),
                TOLERANCES[dtype],
                size,
            )


def test_what_is_collected_of_a_percentile_has_no_gradient() -> None:
    (case, *_) = integer_cases.BY_PERCENTILE
    leaves = case.leaves(torch.float64)
    (kernel,) = serving(case)
    for results in (case.define(leaves), case.run(kernel, leaves)):
        assert [r.requires_grad for r in results] == [True, True, False, False]


@cases(CASES)
def test_the_gradient_of_each_argument_is_the_same_when_no_other_is_wanted(case) -> None:
    leaves = case.leaves(torch.float64)
    results = listed(case.function(*case.arguments(*leaves)))[: case.differentiated]
    together = gradients(results, leaves, upstream(results))
    for i, expected in enumerate(together):
        alone = case.tensors(torch.float64)
        alone[i].requires_grad_()
        some = listed(case.function(*case.arguments(*alone)))[: case.differentiated]
        pairs = zip(some, upstream(results), strict=True)
        pairs = [(r, u) for r, u in pairs if r.requires_grad]
        wanted, given = map(list, zip(*pairs, strict=True))
        assert_near(gradients(wanted, [alone[i]], given), [expected], 1e-12, 1e-9)


# ------------------------------------------------------------ other derivatives


def again(first: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of gradients, of those that depend on anything."""
    pairs = [(f, u) for f, u in zip(first, upstream(first), strict=True) if f.requires_grad]
    wanted, given = map(list, zip(*pairs, strict=True))
    return gradients(wanted, leaves, given)


@cases(OTHERS)
def test_second_derivatives_are_those_of_the_definition(case) -> None:
    def second(results: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        results = results[: case.differentiated]
        loss = sum((r.sin() * u).sum() for r, u in zip(results, upstream(results), strict=True))
        first = gradients([loss], leaves, [torch.ones_like(loss)], create_graph=True)
        return [*first, *again(first, leaves)]

    leaves = case.leaves(torch.float64)
    expected = second(case.define(leaves), leaves)
    for kernel in serving(case):
        leaves = case.leaves(torch.float64)
        assert_near(second(case.run(kernel, leaves), leaves), expected, 1e-9, 1.0)


@cases(OTHERS)
def test_several_gradients_at_once_are_those_of_the_definition(case) -> None:
    leaves = case.leaves(torch.float64)
    expected = case.define(leaves)[: case.differentiated]
    many = upstream(expected, 3)
    one_by_one = [
        gradients(expected, leaves, [u[i] for u in many], retain_graph=True) for i in range(3)
    ]
    for kernel in serving(case):
        leaves = case.leaves(torch.float64)
        results = case.run(kernel, leaves)[: case.differentiated]
        together = torch.autograd.grad(
            results, leaves, many, allow_unused=True, is_grads_batched=True
        )
        for i, found in enumerate(together):
            wanted = [each[i] for each in one_by_one]
            found = torch.zeros(3, *leaves[i].shape) if found is None else found
            assert_near(list(found), wanted, 1e-9, 1.0)


@cases(CASES)
def test_forward_mode_derivatives_go_with_the_gradients_of_the_definition(case) -> None:
    leaves = case.leaves(torch.float64)
    expected = case.define(leaves)[: case.differentiated]
    given = upstream(expected)
    tangents = upstream(leaves)
    backwards = sum(
        (g * t).sum() for g, t in zip(gradients(expected, leaves, given), tangents, strict=True)
    )

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(listed(case.function(*case.arguments(*tensors)))[: case.differentiated])

    primals = tuple(leaf.detach() for leaf in leaves)
    results, moved = torch.func.jvp(call, primals, tuple(tangents))
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
    forwards = sum((m * u).sum() for m, u in zip(moved, given, strict=True))
    torch.testing.assert_close(forwards, backwards.detach(), rtol=1e-9, atol=1e-9)


@cases(OF_SEQUENCES)
def test_sequences_refuse_other_derivatives_and_name_the_remedy(case) -> None:
    leaves = case.leaves(torch.float64)
    results = listed(case.function(*case.arguments(*leaves)))
    with pytest.raises(RuntimeError, match=r"no second derivative.*kernels='reference'"):
        gradients(results, leaves, upstream(results), create_graph=True)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*kernels='reference'"):
        gradients(results, leaves, upstream(results, 3), is_grads_batched=True)
    with qframework.settings.use(kernels="reference"):
        results = listed(case.function(*case.arguments(*leaves)))
    first = gradients(results, leaves, upstream(results), create_graph=True)
    second = again(first, leaves)
    assert any(s.any() for s in second) and all(s.isfinite().all() for s in second)
